"""Any tree by paths of child ranks: text, files, published ones, and back."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trees.strategies import level_order_parents
from treespec_jax.errors import UserError
from treespec_jax.trees import medusa, paths, shapes
from treespec_jax.trees.shapes import MAX_NODES, StaticShape
from treespec_jax.trees.topology import Topology, chain, regular

QUICK = settings(deadline=None, derandomize=True, max_examples=80)


@QUICK
@given(level_order_parents(40))
def test_text_names_the_tree(parents):
    tree = Topology(parents)
    assert shapes.parse(paths.text_of(tree)) == StaticShape(tree)


@QUICK
@given(level_order_parents(), st.randoms())
def test_files_of_either_form_hold_the_same_tree(tmp_path_factory, parents, random):
    """Paths in any order, or parents in any order that has them before children."""
    tree = Topology(parents)
    if tree.num_nodes == 1:
        return
    listed = [list(path) for path in paths.paths_of(tree)[1:]]
    random.shuffle(listed)
    # Depth-first: children of a node stay in order.
    order = sorted(range(tree.num_nodes), key=lambda node: paths.paths_of(tree)[node])
    new = {old: i for i, old in enumerate(order)}
    below = [new[parents[old]] if old else -1 for old in order]
    file = tmp_path_factory.mktemp("trees") / "tree.json"
    for values in (listed, {"parents": below}, {"tree": paths.text_of(tree), "x": 1}):
        file.write_text(json.dumps(values))
        assert shapes.parse(f"file:{file}") == StaticShape(tree)


def test_paths_bring_their_prefixes():
    assert shapes.parse("static:0.0.0").topology == chain(3)
    assert shapes.parse("static:1.0+0.1+0.0+1.1+0").topology == regular((2, 2))
    # Two digits are one rank.
    wide = "+".join(map(str, range(12)))
    assert shapes.parse(f"static:{wide}+11.0").topology.parents[-1] == 12
    assert paths.text_of(Topology((-1,))) == "none"


@pytest.mark.parametrize(
    "text, words",
    {
        "static:0.2": "lacks node 0.1, a sibling of 0.2; add it",
        "static:1.0": "lacks node 0, a sibling of 1; add it",
        "static:" + "9" * 5000: "lacks node",
        "static:" + ".".join("0" * MAX_NODES): f"at most {MAX_NODES - 1} fit",
        "static:" + "+".join(map(str, range(MAX_NODES))): "has too many drafted nodes",
        **dict.fromkeys(
            ("static:", "static:0,1", "static:0..1", "static:01", "static:0+", "file:"),
            "is malformed; write none, chain:LENGTH",
        ),
        "medusa:vicuna": "is unknown; choose from mc_sim_7b_63, ",
        "medusa:mc_sim_7b_63@0": "is malformed",
    }.items(),
    ids=lambda text: text[:24],
)
def test_mistakes(text, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        shapes.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content, words",
    {
        "no json": "is not JSON; write a list of paths",
        "[" * 100_000: "is not JSON",
        **dict.fromkeys(
            (
                *("[]", "[[]]", "[[0], 1]", "[[0.5]]", "[[true]]", "[[-1]]", "{}", "3"),
                *('{"parents": [-1]}', '{"parents": [0, 0]}', '{"parents": [-1, 1]}'),
                *('{"tree": 3}', '{"tree": "file:x"}'),
            ),
            "holds no tree; write a list of paths",
        ),
        "[[0], [2]]": "lacks node 1, a sibling of 2",
        json.dumps({"parents": [-1] + [0] * MAX_NODES}): "has too many drafted nodes",
        '{"tree": "static:1"}': "tree 'static:1' lacks node 0",
    }.items(),
    ids=lambda text: text[:24],
)
def test_bad_files(tmp_path, content, words):
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        shapes.parse(f"file:{file}")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("tree ") <= 2


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="^tree file /no/such: No such file"):
        shapes.parse("file:/no/such")


# Of the published lists: nodes at depth 1, 2, …, the last path in level order, and the
# sum of all ranks.
PUBLISHED = {
    "mc_sim_7b_63": ((10, 28, 23, 2), (0, 0, 0, 1), 260),
    "vicuna_7b_stage2": ((10, 23, 23, 7), (0, 1, 0, 0), 222),
    "vicuna_7b_stage1_ablation": ((10, 21, 25, 7), (0, 1, 0, 0), 222),
    "vicuna_7b_stage1": ((10, 32, 20, 1), (0, 0, 0, 0), 258),
    "vicuna_13b_stage2": ((10, 19, 25, 9), (1, 0, 0, 0), 215),
    "vicuna_13b_stage1": ((10, 29, 23, 1), (0, 0, 0, 0), 253),
    "vicuna_33b_stage2": ((10, 24, 24, 5), (0, 1, 0, 0), 230),
    "vicuna_33b_stage1": ((10, 34, 19), (2, 0, 0), 267),
    "zephyr_stage2": ((10, 27, 23, 3), (0, 0, 1, 0), 240),
}


@pytest.mark.parametrize("name", medusa.NAMES)
def test_published_trees(name):
    tree = shapes.parse(f"medusa:{name}").topology
    sizes, last, ranks = PUBLISHED[name]
    assert tuple(len(tree.level(d + 1)) for d in range(tree.depth)) == sizes
    named = paths.paths_of(tree)
    assert (named[-1], sum(map(sum, named))) == (last, ranks)
    cut = shapes.parse(f"medusa:{name}@2").topology
    assert paths.paths_of(cut) == [path for path in named if len(path) <= 2]
    assert shapes.parse(f"medusa:{name}@99").topology == tree
