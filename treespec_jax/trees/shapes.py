"""Tree shapes and the words that name them."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from treespec_jax.errors import UserError
from treespec_jax.trees.topology import Topology, chain, regular

# A tree is verified in one pass and its mask is T x T: beyond this nothing gains.
MAX_NODES = 1024


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
    """

    nodes: int
    depth: int
    width: int
    children: int

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
    """

    nodes: int
    depth: int

    @property
    def num_nodes(self) -> int:
        """T, the root included."""
        return self.nodes + 1

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Nodes at depth 0, …, C: falling in even steps, at least one each."""
        weights = np.arange(self.depth, 0, -1)
        spare = self.nodes - self.depth
        ends = np.round(np.cumsum(weights) / weights.sum() * spare).astype(int)
        return (1, *(int(n) + 1 for n in np.diff(ends, prepend=0)))


TreeShape = StaticShape | BestFirstShape | AllottedShape
ROOT_ONLY = StaticShape(Topology((-1,)))

_GRAMMAR = (
    "none, chain:LENGTH, regular:AxBxC, dynamic:NODES@DEPTH or allotted:NODES@DEPTH"
)


def is_chain(shape: TreeShape) -> bool:
    """Whether no node ever has a sibling."""
    return isinstance(shape, StaticShape) and shape.depth == shape.num_nodes - 1


def parse(text: str) -> TreeShape:
    """Reads the name of a tree shape.

    `none` is plain decoding; `chain:5` five nodes in a row; `regular:4x2x1` four
    children of the root, two of each of those, one of each of those (20 nodes);
    `dynamic:15@5` the 15 best paths down to depth 5, chosen anew at every step;
    `allotted:15@5` as many nodes in levels of fixed sizes, shared out among their
    parents before they are proposed, as rules that sample need it. Node counts leave
    out the root: T is one more.

    Raises:
      UserError: not of that grammar, or more than MAX_NODES nodes.
    """
    text = str(text).strip()
    kind, _, rest = text.partition(":")
    if text == "none":
        return ROOT_ONLY
    if kind == "chain" and re.fullmatch(r"[1-9]\d*", rest):
        length = _number(rest)
        _check_size(text, length)
        return StaticShape(chain(length))
    if kind == "regular" and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        branching = tuple(_number(part) for part in rest.split("x"))
        nodes, level = 0, 1
        for children in branching:
            level *= children
            nodes += level
            _check_size(text, nodes)
        return StaticShape(regular(branching))
    match = re.fullmatch(r"([1-9]\d*)@([1-9]\d*)", rest)
    if kind in ("dynamic", "allotted") and match:
        nodes, depth = _number(match[1]), _number(match[2])
        _check_size(text, nodes)
        if depth > nodes:
            raise UserError(
                f"tree {_quoted(text)}: {nodes} nodes cannot be {depth} deep; "
                f"lower the depth to {nodes} at most"
            )
        if kind == "allotted":
            return AllottedShape(nodes, depth)
        # A quarter of the nodes per level and few children of each lose next to
        # nothing against a full search, and keep the drafter's passes thin.
        width = min(8, math.ceil(nodes / 4))
        return BestFirstShape(nodes, depth, width, max(4, math.ceil(nodes / width)))
    raise UserError(
        f"tree {_quoted(text)} is malformed; write {_GRAMMAR}, all of them >= 1"
    )


def _check_size(text: str, nodes: int) -> None:
    if nodes + 1 > MAX_NODES:
        raise UserError(
            f"tree {_quoted(text)} has too many drafted nodes; at most "
            f"{MAX_NODES - 1} fit"
        )


def _number(digits: str) -> int:
    """Of any length: Python itself reads 4300 digits at most, and slowly."""
    return int(digits) if len(digits) < 10 else 10**9


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
