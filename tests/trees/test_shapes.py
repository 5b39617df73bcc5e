"""The words that name tree shapes: what they mean, and what is refused."""

from __future__ import annotations

import time

import pytest

from treespec_jax.errors import UserError
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import (
    MAX_NODES,
    AllottedShape,
    BestFirstShape,
    StaticShape,
)

# name: (drafted nodes, depth)
GOOD = {
    "none": (0, 0),
    "chain:1": (1, 1),
    "chain:5": (5, 5),
    f"chain:{MAX_NODES - 1}": (MAX_NODES - 1, MAX_NODES - 1),
    "regular:3": (3, 1),
    "regular:4x2x1": (4 + 8 + 8, 3),
    "regular:1x1x2": (1 + 1 + 2, 3),
    "dynamic:15@5": (15, 5),
    "allotted:15@5": (15, 5),
    "allotted:1@1": (1, 1),
    "dynamic:1@1": (1, 1),
    "dynamic:3@3": (3, 3),
    "dynamic:15@5/4": (15, 5),
    "dynamic:15@5/4~0.05": (15, 5),
    "dynamic:15@5~cost": (15, 5),
    "allotted:15@5/3": (15, 5),
    " chain:2 ": (2, 2),
}
MALFORMED = [
    "",
    "None",
    "none:",
    "none:1",
    "tree:3",
    "chain",
    "chain:",
    "chain:0",
    "chain:-1",
    "chain:+1",
    "chain:1.5",
    "chain:05",
    "chain: 5",
    "chain:5x2",
    "chain:five",
    "chain:1_0",
    "Chain:5",
    "regular",
    "regular:",
    "regular:0",
    "regular:4x0",
    "regular:4x",
    "regular:x4",
    "regular:4xx2",
    "regular:4X2",
    "regular:-4x2",
    "regular:4,2",
    "dynamic:",
    "dynamic:15",
    "dynamic:15@",
    "allotted:15",
    "allotted:0@1",
    "dynamic:@5",
    "dynamic:0@1",
    "dynamic:5@0",
    "dynamic:-5@2",
    "dynamic:5@2@1",
    "dynamic:5x2",
    "dynamic:5@2/0",
    "dynamic:5@2~",
    "dynamic:5@2~1.5",
    "dynamic:5@2~0.1/3",
    "dynamic:5@2~costs",
    "allotted:5@2~cost",
    "allotted:5@2~0.1",
    "7",
    ":",
    "chain:5;regular:2",
]
TOO_MANY = [
    f"chain:{MAX_NODES}",
    "regular:32x32",
    "regular:2x2x2x2x2x2x2x2x2x2",
    f"dynamic:{MAX_NODES}@2",
    f"chain:{10**30}",
    f"regular:{10**30}x{10**30}",
    f"dynamic:{10**30}@3",
    "regular:" + "x".join(["1"] * 5000),
    "regular:" + "x".join(["9" * 30] * 1000),
    # Past the number of digits that Python reads or prints by itself.
    "chain:" + "9" * 5000,
    "regular:" + "9" * 3000 + "x" + "9" * 3000,
    "dynamic:" + "9" * 5000 + "@2",
]


@pytest.mark.parametrize("text", GOOD)
def test_good_names_give_their_counts(text):
    shape = shapes.parse(text)
    nodes, depth = GOOD[text]
    assert (shape.num_nodes, shape.depth) == (nodes + 1, depth)
    kinds = {"dynamic": BestFirstShape, "allotted": AllottedShape}
    assert isinstance(shape, kinds.get(text.strip().split(":")[0], StaticShape))
    if isinstance(shape, AllottedShape):
        assert sum(shape.level_sizes) == shape.num_nodes
    if isinstance(shape, BestFirstShape):
        assert shape.nodes == nodes and shape.width >= 1 and shape.children >= 1


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_names_are_refused_with_the_grammar(text):
    """The message quotes what was given and says what would do."""
    with pytest.raises(UserError, match="chain:LENGTH") as caught:
        shapes.parse(text)
    assert repr(text.strip()) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TOO_MANY, ids=lambda text: text[:24])
def test_too_many_nodes_are_refused_quickly(text):
    begun = time.process_time()
    with pytest.raises(UserError, match=f"at most {MAX_NODES - 1} fit"):
        shapes.parse(text)
    assert time.process_time() - begun < 0.5


def test_a_dynamic_tree_no_deeper_than_its_nodes():
    with pytest.raises(UserError, match="cannot be 5 deep; lower the depth to 3"):
        shapes.parse("dynamic:3@5")


def test_huge_depth_is_refused():
    with pytest.raises(UserError, match="cannot be"):
        shapes.parse("dynamic:3@" + "9" * 5000)


def test_equal_names_give_equal_hashable_shapes():
    for text in GOOD:
        assert len({shapes.parse(text), shapes.parse(text)}) == 1
