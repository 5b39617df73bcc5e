"""Every drafter by the contract."""

from __future__ import annotations

import pytest

from tests.drafting.contract import DrafterContract
from treespec_jax import speculation
from treespec_jax.config import SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.drafting.ngram import NgramDrafter
from treespec_jax.drafting.none import NoDrafter
from treespec_jax.errors import UserError


class TestDraftModel(DrafterContract):
    # The other structures are grown by the same functions for every drafter.
    shapes = ("regular:2x2x1", "allotted:5@3")

    @pytest.fixture(scope="class")
    def drafter(self, tiny_draft):
        return DraftModel(tiny_draft, 0.7)


class TestNgram(DrafterContract):
    @pytest.fixture(scope="class")
    def drafter(self):
        return NgramDrafter(3, 0.7)


class TestNoDrafter(DrafterContract):
    shapes = ("none",)

    @pytest.fixture(scope="class")
    def drafter(self):
        return NoDrafter()

    def test_it_has_no_other_trees(self, empty, propose, texts):
        with pytest.raises(ValueError, match="no drafter can propose"):
            propose(empty, texts, [20] * 3, "chain:2")


def test_every_method_has_a_class_that_is_what_is_said_of_it():
    for name, method in METHODS.items():
        cls, options = speculation.find(SpeculativeConfig(method=name))
        assert cls.__name__ == method.name and isinstance(options, cls.Options)


def test_an_unknown_option_is_named():
    config = SpeculativeConfig(method="draft_model", options={"longest": 3})
    with pytest.raises(UserError, match="'longest' in options of method 'draft_model'"):
        speculation.find(config)
