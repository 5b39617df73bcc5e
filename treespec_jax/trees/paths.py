"""Static trees as paths of child ranks: text, JSON files, and back.

A node is named by the ranks on the way down to it, as Medusa publishes its trees
(2401.10774): 0.2 is the third child of the first child of the root.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.errors import UserError
from treespec_jax.trees.topology import MAX_NODES, Topology

RankPath = tuple[int, ...]
TOO_MANY = f"has too many drafted nodes; at most {MAX_NODES - 1} fit"
# What a file of a tree may hold.
_FILE = (
    'write a list of paths such as [[0], [0, 0], [1]], {"parents": [-1, 0, 0, 1]} or '
    '{"tree": "static:0.0+1"}'
)


def paths_of(topology: Topology) -> list[RankPath]:
    """The path of every node in level order; the root's is empty."""
    paths: list[RankPath] = [()]
    for parent, rank in zip(topology.parents[1:], topology.ranks[1:], strict=True):
        paths.append((*paths[parent], int(rank)))
    return paths


def topology_of(paths: Iterable[Sequence[int]]) -> Topology:
    """The tree of some paths and of all that lie on the way to their ends.

    Args:
      paths: ranks >= 0 from the root down, in any order; repeated ones count once.

    Raises:
      ValueError: a node of rank r lacks one of its siblings 0, …, r - 1, or the tree
        has MAX_NODES nodes or more below its root; the message is a predicate, such as
        "lacks node 0.1, a sibling of 0.2; add it".
    """
    nodes: set[RankPath] = set()
    for path in map(tuple, paths):
        if len(path) >= MAX_NODES:
            raise ValueError(TOO_MANY)
        while path and path not in nodes:
            nodes.add(path)
            path = path[:-1]
        if len(nodes) >= MAX_NODES:
            raise ValueError(TOO_MANY)
    ordered = sorted(nodes, key=lambda path: (len(path), path))
    number: dict[RankPath, int] = {(): 0}
    for path in ordered:
        elder = (*path[:-1], path[-1] - 1)
        if path[-1] and elder not in number:
            raise ValueError(
                f"lacks node {_name(elder)}, a sibling of {_name(path)}; add it"
            )
        number[path] = len(number)
    return Topology((-1, *(number[path[:-1]] for path in ordered)))


def limited(topology: Topology, depth: int) -> Topology:
    """The nodes at most `depth` below the root."""
    count = int((topology.depths <= depth).sum())
    return Topology(topology.parents[:count])


def text_of(topology: Topology) -> str:
    """The name of a tree for `shapes.parse`: the paths of its leaves, in level order.

    For example "static:1+0.0+0.1"; "none" for a root alone.
    """
    inner = set(topology.parents)
    paths = paths_of(topology)
    leaves = [path for node, path in enumerate(paths) if node not in inner]
    return f"static:{'+'.join(map(_name, leaves))}" if leaves[0] else "none"


def read_file(path: str) -> Topology | str:
    """The tree in a JSON file, or the name of a shape that it holds.

    The file holds a list of paths, {"parents": […]} (-1 for the root, which comes
    first; a parent before its children), or {"tree": NAME}; other keys are ignored.

    Raises:
      UserError: an unreadable file, or none of these.
      ValueError: paths that make no tree, see `topology_of`.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text("utf-8"))
    except OSError as error:
        raise UserError(f"tree file {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"tree file {path} is not JSON; {_FILE}") from None
    if isinstance(values, list) and values and all(map(_are_ranks, values)):
        return topology_of(values)
    if isinstance(values, dict):
        parents, name = values.get("parents"), values.get("tree")
        if isinstance(name, str) and not name.strip().startswith("file:"):
            return name
        if name is None and _are_parents(parents):
            return topology_of(_paths_of_parents(parents))
    raise UserError(f"tree file {path} holds no tree; {_FILE}")


def _are_ranks(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(rank) is int and rank >= 0 for rank in value)
    )


def _are_parents(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(type(parent) is int for parent in value)
        and value[0] == -1
        and all(0 <= parent < node for node, parent in enumerate(value) if node)
    )


def _paths_of_parents(parents: Sequence[int]) -> list[RankPath]:
    """Siblings rank in the order of their numbers."""
    if len(parents) > MAX_NODES:
        raise ValueError(TOO_MANY)
    paths: list[RankPath] = [()]
    children = [0] * len(parents)
    for parent in parents[1:]:
        paths.append((*paths[parent], children[parent]))
        children[parent] += 1
    return paths


def _name(path: RankPath) -> str:
    return ".".join(map(str, path))
