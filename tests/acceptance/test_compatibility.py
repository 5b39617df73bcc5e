"""Rules refuse trees that they are not lossless for, before anything is loaded."""

from __future__ import annotations

import pytest

from treespec_jax.acceptance import compatibility
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes

CHAIN, TREE, DYNAMIC = (
    shapes.parse(s) for s in ("chain:3", "regular:2x1", "dynamic:7@3")
)


@pytest.mark.parametrize(
    "rule, proposal, shape, words",
    [
        ("tokn", "", CHAIN, "unknown; choose from exact, token"),
        ("token", "guessed", CHAIN, "proposal 'guessed' is unknown"),
        ("token", "shared", DYNAMIC, "re-ranked"),
        ("token", "best", TREE, "sampled from q"),
        ("traversal", "with_replacement", TREE, "not be lossless"),
        ("block", "", TREE, "tree='chain:LENGTH', or rule='traversal'"),
        ("block", "", DYNAMIC, "judges chains only"),
        ("token", "", DYNAMIC, "take tree=.allotted:7@3."),
        ("terminal", "sampled", TREE, "without any sample"),
        ("exact", "with_replacement", TREE, "different tokens"),
    ],
)
def test_refused(rule, proposal, shape, words):
    with pytest.raises(UserError, match=words):
        compatibility.choose_proposal(rule, proposal, shape)


def test_chosen():
    for rule, own in compatibility.RULES.items():
        assert compatibility.choose_proposal(rule, "", CHAIN) == own.proposals[0]
        for proposal in own.proposals:
            assert compatibility.choose_proposal(rule, proposal, CHAIN) == proposal
    assert [r for r, own in compatibility.RULES.items() if not own.lossless] == [
        "typical"
    ]
    assert compatibility.RULES["typical"].label == "lossy"
