"""Rules refuse trees that they are not lossless for, before anything is loaded."""

from __future__ import annotations

import pytest

from treespec_jax.acceptance import facts
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes

CHAIN, TREE, DYNAMIC = (
    shapes.parse(s) for s in ("chain:3", "regular:2x1", "dynamic:7@3")
)


@pytest.mark.parametrize(
    "rule, draws, shape, words",
    [
        ("tokn", "", CHAIN, "unknown; choose from exact, token"),
        ("token", "guessed", CHAIN, "draws 'guessed' is unknown"),
        ("token", "shared", DYNAMIC, "re-ranked"),
        ("token", "best", TREE, "drawn from q"),
        ("traversal", "with_replacement", TREE, "not be lossless"),
        ("block", "", TREE, "tree='chain:LENGTH', or rule='traversal'"),
        ("block", "", DYNAMIC, "judges chains only"),
        ("terminal", "sampled", TREE, "without any sample"),
        ("exact", "with_replacement", TREE, "different tokens"),
    ],
)
def test_refused(rule, draws, shape, words):
    with pytest.raises(UserError, match=words):
        facts.choose_draws(rule, draws, shape)


def test_chosen():
    for rule, own in facts.FACTS.items():
        assert facts.choose_draws(rule, "", CHAIN) == own.draws[0]
        for draws in own.draws:
            assert facts.choose_draws(rule, draws, CHAIN) == draws
    assert [r for r, own in facts.FACTS.items() if not own.lossless] == ["typical"]
    assert facts.FACTS["typical"].label == "lossy"
