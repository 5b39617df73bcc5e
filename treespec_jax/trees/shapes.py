"""Tree shapes and the words that name them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from treespec_jax.errors import UserError
from treespec_jax.trees import medusa, paths
from treespec_jax.trees.topology import MAX_NODES, Topology, chain, regular


@dataclasses.dataclass(frozen=True)
class StaticShape:
    """A tree whose topology is known before drafting."""

    topology: Topology

    @property
    def num_nodes(self) -> int:
        """T, the root included."""
        return self.topology.num_nodes

    @property
    def depth(self) -> int:
        """C, levels below the root."""
        return self.topology.depth


@dataclasses.dataclass(frozen=True)
class BestFirstShape:
    """The `nodes` paths of best estimated probability, at most `depth` deep.

    Chosen anew at every step, after the drafter proposed them.

    Attributes:
      nodes: drafted nodes, the root not counted.
      depth: levels below the root, one pass of the drafter each.
      width: W, nodes that the drafter expands per level.
      children: best children looked at per expanded node.
      level: nodes of a level at most, the likeliest; None: any number.
      threshold: a node whose path has less estimated probability gets no children;
        where no text of a batch has a likelier path, the drafter runs no further.
      priced: the drafter runs no further than a level is worth its time
        (`drafting.levels`).
    """

    nodes: int
    depth: int
    width: int
    children: int
    level: int | None = None
    threshold: float = 0.0
    priced: bool = False

    @property
    def num_nodes(self) -> int:
        """T, the root included."""
        return self.nodes + 1

    @property
    def root_children(self) -> int:
        """Children of the root looked at: one row, so that more of them cost little."""
        return self.nodes if self.depth == 1 else min(self.nodes, max(8, self.children))


@dataclasses.dataclass(frozen=True)
class AllottedShape:
    """Levels of fixed sizes, whose nodes are shared out before they are proposed.

    Parents get children by the probability of their paths (`drafting.growth`), anew at
    every step.

    Attributes:
      nodes: drafted nodes, the root not counted.
      depth: levels below the root, one pass of the drafter each.
      level: nodes of a level at most, at least nodes / depth; None: any number.
    """

    nodes: int
    depth: int
    level: int | None = None

    @property
    def num_nodes(self) -> int:
        """T, the root included."""
        return self.nodes + 1

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Nodes at depth 0, …, C: falling in even steps, at least one each.

        What a level may not hold goes to the first ones with room.
        """
        weights = np.arange(self.depth, 0, -1)
        spare = self.nodes - self.depth
        ends = np.round(np.cumsum(weights) / weights.sum() * spare).astype(int)
        sizes = np.diff(ends, prepend=0) + 1
        if self.level is not None:
            sizes, over = np.minimum(sizes, self.level), sizes - self.level
            missing = int(np.maximum(over, 0).sum())
            room = np.minimum(np.cumsum(self.level - sizes), missing)
            sizes = sizes + np.diff(room, prepend=0)
        return (1, *map(int, sizes))


TreeShape = StaticShape | BestFirstShape | AllottedShape
ROOT_ONLY = StaticShape(Topology((-1,)))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Shapes to choose from before every dispatch, plain decoding among them.

    Attributes:
      shapes: best-first ones, the first to be compiled first; then `ROOT_ONLY`.
    """

    shapes: tuple[TreeShape, ...]

    @property
    def depth(self) -> int:
        """C, of the deepest shape."""
        return max(shape.depth for shape in self.shapes)

    @property
    def num_nodes(self) -> int:
        """T, of the largest shape."""
        return max(shape.num_nodes for shape in self.shapes)


# Shapes of a ladder at most, plain decoding included; and the one called `auto`.
MAX_RUNGS = 5
LADDER = "auto:7@4+3@3+15@5+31@7"

_GRAMMAR = (
    "none, chain:LENGTH, regular:AxBxC, dynamic:NODES@DEPTH, allotted:NODES@DEPTH, "
    "either with /LEVEL, dynamic with ~THRESHOLD or ~cost, "
    "static:PATH+PATH (child ranks, as in 0.0+1), medusa:NAME, medusa:NAME@DEPTH, "
    "file:PATH, auto or auto:NODES@DEPTH+NODES@DEPTH"
)


def is_chain(shape: TreeShape) -> bool:
    """Whether no node ever has a sibling."""
    return isinstance(shape, StaticShape) and shape.depth == shape.num_nodes - 1


def parse(text: str) -> TreeShape | Ladder:
    """Reads the name of a tree shape, or of several to choose from.

    `none` is plain decoding; `chain:5` five nodes in a row; `regular:4x2x1` four
    children of the root, two of each of those, one of each of those (20 nodes);
    `dynamic:15@5` the 15 best paths down to depth 5, chosen anew at every step;
    `allotted:15@5` as many nodes in levels of fixed sizes, shared out among their
    parents before they are proposed, as rules that sample need it; `dynamic:15@5/4`
    and `allotted:15@5/4` have 4 nodes in a level at most; in `dynamic:15@5~0.1` paths
    of a probability under 0.1 are not gone on with, and in `dynamic:15@5~cost` levels
    that are not worth their time are left out. Node counts leave out the root: T is one
    more.

    `static:0.0.0+0.1+1` is any tree, named by paths of child ranks: these nodes and all
    on the way to them; siblings of lower rank must be among them.
    `medusa:mc_sim_7b_63` is a published tree (`trees.medusa`), `medusa:mc_sim_7b_63@3`
    its first three levels.
    `file:PATH` reads a JSON file (`trees.paths.read_file`).

    `auto:7@4+3@3+15@5` is a `Ladder` of dynamic trees, the first of which is compiled
    first, and plain decoding; `auto` one of LADDER.

    Raises:
      UserError: not of that grammar, more than MAX_NODES nodes, or a file that cannot
        be read.
    """
    text = str(text).strip()
    kind, _, rest = text.partition(":")
    if text == "none":
        return ROOT_ONLY
    if text == "auto":
        text = LADDER
        kind, _, rest = text.partition(":")
    try:
        shape = _PARSERS[kind](rest) if kind in _PARSERS else None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"tree {_quoted(text)} {error}") from None
    if shape is None:
        raise UserError(f"tree {_quoted(text)} is malformed; write {_GRAMMAR}")
    return shape


# Each reads what stands behind the colon: None if that is malformed; a ValueError's
# message continues "tree '…' ".


def _parse_chain(rest: str) -> TreeShape | None:
    if not re.fullmatch(r"[1-9]\d*", rest):
        return None
    length = _number(rest)
    _check_size(length)
    return StaticShape(chain(length))


def _parse_regular(rest: str) -> TreeShape | None:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        return None
    branching = tuple(_number(part) for part in rest.split("x"))
    nodes, level = 0, 1
    for children in branching:
        level *= children
        nodes += level
        _check_size(nodes)
    return StaticShape(regular(branching))


def _parse_dynamic(rest: str) -> TreeShape | None:
    match = re.fullmatch(r"([^~]*)(~(0|1|0\.\d{1,9}|cost))?", rest)
    counts = _nodes_and_depth(match[1]) if match else None
    if counts is None:
        return None
    if match[3] == "cost":
        return dynamic(*counts, priced=True)
    return dynamic(*counts, float(match[3] or 0))


def dynamic(
    nodes: int,
    depth: int,
    level: int | None = None,
    threshold: float = 0.0,
    priced: bool = False,
) -> BestFirstShape:
    """The best-first shape that `dynamic:NODES@DEPTH/LEVEL~THRESHOLD` names."""
    # A quarter of the nodes per level and few children of each lose next to nothing
    # against a full search, and keep the drafter's passes thin.
    width = min(8, math.ceil(nodes / 4))
    children = max(4, math.ceil(nodes / width))
    return BestFirstShape(nodes, depth, width, children, level, threshold, priced)


def _parse_allotted(rest: str) -> TreeShape | None:
    counts = _nodes_and_depth(rest)
    return None if counts is None else AllottedShape(*counts)


def _nodes_and_depth(rest: str) -> tuple[int, int, int | None] | None:
    """And nodes per level."""
    match = re.fullmatch(r"([1-9]\d*)@([1-9]\d*)(/[1-9]\d*)?", rest)
    if match is None:
        return None
    nodes, depth = _number(match[1]), _number(match[2])
    level = _number(match[3][1:]) if match[3] else None
    _check_size(nodes)
    if depth > nodes:
        raise ValueError(
            f"has {nodes} nodes, which cannot be {depth} deep; lower the depth to "
            f"{nodes} at most"
        )
    if level is not None and level * depth < nodes:
        raise ValueError(
            f"has {nodes} nodes, of which {depth} levels of {level} hold "
            f"{level * depth}; lower the first number"
        )
    return nodes, depth, level


def _parse_static(rest: str) -> TreeShape | None:
    number = r"(0|[1-9]\d*)"
    path = rf"{number}(\.{number})*"
    if not re.fullmatch(rf"{path}(\+{path})*", rest):
        return None
    named = (map(_number, path.split(".")) for path in rest.split("+"))
    return StaticShape(paths.topology_of(named))


def _parse_medusa(rest: str) -> TreeShape | None:
    name, limit, depth = rest.partition("@")
    if name not in medusa.NAMES:
        raise ValueError(f"is unknown; choose from {', '.join(medusa.NAMES)}")
    topology = medusa.topology(name)
    if limit:
        if not re.fullmatch(r"[1-9]\d*", depth):
            return None
        topology = paths.limited(topology, _number(depth))
    return StaticShape(topology)


def _parse_file(rest: str) -> TreeShape | None:
    if not rest:
        return None
    tree = paths.read_file(rest)
    return parse(tree) if isinstance(tree, str) else StaticShape(tree)


def _parse_auto(rest: str) -> Ladder | None:
    rungs = list(dict.fromkeys(map(_parse_dynamic, rest.split("+"))))
    if None in rungs:
        return None
    if len(rungs) >= MAX_RUNGS:
        raise ValueError(f"has too many shapes; {MAX_RUNGS - 1} fit at most")
    return Ladder((*rungs, ROOT_ONLY))


@functools.cache
def text_of(shape: TreeShape) -> str:
    """A name that `parse` reads."""
    if isinstance(shape, StaticShape):
        return paths.text_of(shape.topology) if shape.depth else "none"
    kind = "dynamic" if isinstance(shape, BestFirstShape) else "allotted"
    level = "" if shape.level is None else f"/{shape.level}"
    threshold = getattr(shape, "threshold", 0.0)
    number = np.format_float_positional(threshold, trim="-")
    end = f"{level}~{number}" if threshold else level
    if getattr(shape, "priced", False):
        end = f"{level}~cost"
    return f"{kind}:{shape.nodes}@{shape.depth}{end}"


_PARSERS = {
    "auto": _parse_auto,
    "chain": _parse_chain,
    "regular": _parse_regular,
    "dynamic": _parse_dynamic,
    "allotted": _parse_allotted,
    "static": _parse_static,
    "medusa": _parse_medusa,
    "file": _parse_file,
}


def _check_size(nodes: int) -> None:
    if nodes + 1 > MAX_NODES:
        raise ValueError(paths.TOO_MANY)


def _number(digits: str) -> int:
    """Of any length: Python itself reads 4300 digits at most, and slowly."""
    return int(digits) if len(digits) < 10 else 10**9


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
