"""Every drafter by the contract."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.drafting.contract import DrafterContract
from treespec_jax import speculation
from treespec_jax.config import SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.drafting.auto import Auto, AutoOptions
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.drafting.none import NoDrafter
from treespec_jax.drafting.rates import Rates
from treespec_jax.errors import UserError


class TestDraftModel(DrafterContract):
    # The other structures are grown by the same functions for every drafter.
    shapes = ("regular:2x2x1", "allotted:5@3")

    @pytest.fixture(scope="class")
    def drafter(self, tiny_draft):
        return DraftModel(tiny_draft, 0.7)


class SourcesContract(DrafterContract):
    """Of drafters without a model, which measure what their guesses are worth."""

    def forget(self, state):
        def fresh(x):
            if not isinstance(x, Rates):
                return x
            ones = jnp.ones_like(x.hits)
            # Equal estimates would be ordered by rounding.
            return Rates(ones / (2 + jnp.arange(len(ones))), ones)

        return jax.tree.map(fresh, state, is_leaf=lambda x: isinstance(x, Rates))


def made(method: str, **options):
    """A drafter without a model."""
    cls, found = speculation.find(SpeculativeConfig(method=method, options=options))
    return cls.make(None, 1.0, found)


class TestRecycle(SourcesContract):
    shapes = ("regular:2x2x1", "dynamic:5@3", "allotted:5@3")

    @pytest.fixture(scope="class")
    def drafter(self):
        return made("recycle", successors=4)


class TestNgram(SourcesContract):
    shapes = ("chain:3", "regular:2x2x1")

    @pytest.fixture(scope="class")
    def drafter(self):
        return made("ngram", history=0)


class TestSuffix(SourcesContract):
    shapes = ("dynamic:5@3",)

    @pytest.fixture(scope="class")
    def drafter(self):
        return made("suffix")


class TestLastLogits(SourcesContract):
    shapes = ("dynamic:5@3",)

    @pytest.fixture(scope="class")
    def drafter(self):
        return made("last_logits", candidates=3)


class TestAuto(SourcesContract):
    shapes = ("dynamic:5@3", "allotted:5@3")

    @pytest.fixture(scope="class")
    def drafter(self):
        return made("auto", history=0, successors=4, candidates=3)


class TestAutoWithModel(SourcesContract):
    shapes = ("dynamic:5@3",)

    @pytest.fixture(scope="class")
    def drafter(self, tiny_draft):
        options = AutoOptions(history=0, successors=4, candidates=3)
        return Auto.make(tiny_draft, 0.7, options)

    def copy_page(self, state, source, destination):
        model = super().copy_page(state.model, source, destination)
        return dataclasses.replace(state, model=model)


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
