"""`exact="bitwise"` of grouped queries, and what it does not go with."""

from __future__ import annotations

import pytest

from tests.conftest import TINY
from tests.engine.bitwise import BitwiseContract, build, run
from treespec_jax.checkpoints import load
from treespec_jax.checkpoints.catalogue import BUNDLED
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

# Not all code generators of XLA give one row and many the same bits.
pytestmark = [pytest.mark.slow, pytest.mark.optimised]


class TestLlama(BitwiseContract):
    config = TINY

    def test_other_modes_differ_in_bits(self, pair, prompts):
        """So the above compares what could differ."""
        books = []
        for layout in (("none", 1, 64, 1, (16,)), ("dynamic:15@5", 5, 16, 4, (8,))):
            engine, book = build(pair, layout, exact="")
            run(engine, prompts)
            books.append(book.rows)
        # Up to where a text goes another way.
        assert any(books[1].get(key) != row for key, row in books[0].items())


BUNDLED_NAME = str(BUNDLED / "target")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(weights="float32"), "int8 weights"),
        (dict(weights="bfloat16"), "int8 weights"),
        (dict(cache_dtype="float32"), "keys and values in int8"),
        (dict(dtype="bfloat16"), "float32 activations"),
        (dict(mesh="tensor:1"), "one device"),
        (dict(exact="bits"), "'bits'"),
    ],
)
def test_what_it_does_not_go_with(settings, words):
    with pytest.raises(UserError, match=words):
        LLM(BUNDLED_NAME, speculative=None, **{"exact": "bitwise"} | settings)


def test_a_loaded_model_in_other_weights_is_refused():
    loaded = load(BUNDLED / "target", "float32")
    with pytest.raises(UserError, match="weights='int8'"):
        LLM(loaded, speculative=None, exact="bitwise")


def test_an_llm_takes_the_types_that_it_needs():
    llm = LLM(BUNDLED_NAME, speculative=None, exact="bitwise", max_len=32)
    assert (llm.weights, llm.engine.config.cache_dtype) == ("int8", "int8")
