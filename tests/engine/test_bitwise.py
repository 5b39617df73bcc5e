"""`exact="bitwise"` of grouped queries, and what it does not go with."""

from __future__ import annotations

import pytest

from tests.conftest import TINY
from tests.engine.bitwise import BitwiseContract
from treespec_jax.checkpoints import load
from treespec_jax.checkpoints.catalogue import BUNDLED
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

# Not all code generators of XLA give one row and many the same bits.
pytestmark = [pytest.mark.slow, pytest.mark.optimised]


class TestLlama(BitwiseContract):
    config = TINY


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
