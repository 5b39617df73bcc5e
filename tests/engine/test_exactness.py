"""The probe of the target's pass, and what is said of texts that differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from tests.conftest import TINY
from tests.oracles import perturbed_scores
from treespec_jax.checkpoints import LoadedModel
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.llm import LLM
from treespec_jax.measurement import exactness
from treespec_jax.measurement.exactness import Probe
from treespec_jax.models.transformer import Transformer

CONFIG = EngineConfig(max_batch=1, max_len=64, page_size=16)
EXACT = Probe(8, 0.0, 0.0, True)


def test_one_row_is_within_rounding_of_eight(tiny_target):
    found = exactness.probe(tiny_target, CONFIG, 8)
    assert found.rows == 8
    assert found.logits < 1e-4 and found.kv < 1e-4
    assert found.near(SamplingParams()) < 4e-4


def test_rows_that_see_each_other_are_found(tiny_target, monkeypatch):
    """A product that takes all rows into account: the probe measures what it does."""

    def leaking(weight, x_IR, out_dtype=None):
        y = true(weight, x_IR, out_dtype)
        return y + 0.01 * (y.mean(-1, keepdims=True) - y[..., :1])

    true = exactness.linear
    for module in ("layers", "transformer"):
        monkeypatch.setattr(f"treespec_jax.models.{module}.linear", leaking)
    monkeypatch.setattr(exactness, "linear", leaking)
    found = exactness.probe(tiny_target, CONFIG, 8)
    assert found.logits > 1e-3 and found.kv > 1e-3 and not found.products_equal


def test_integer_products_are_bit_equal():
    """Over a cache in int8 as well."""
    model = Transformer(TINY, weights="int8", rngs=nnx.Rngs(0))
    config = dataclasses.replace(CONFIG, cache_dtype="int8")
    assert exactness.probe(model, config, 8).products_equal


@pytest.fixture(scope="module")
def llm(tiny_target):
    loaded = LoadedModel(TINY, tiny_target, None, "tiny", np.dtype("float32"))
    engine = dict(max_batch=1, max_len=64, page_size=16, prefill_chunks=(16,))
    with LLM(loaded, speculative=None, steps_per_dispatch=4, **engine) as llm:
        yield llm


def verdict(llm, texts, plain, params, probed):
    return exactness.verdict(llm, exactness.pairs(texts, plain, params), probed)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_differences_are_scored_as_plain_decoding_does(llm, tiny_target, temperature):
    """The gap is that of an oracle; it decides what is a near tie."""
    prompt, other = [5, 9, 14], [6, 7, 8, 11]
    params = SamplingParams(max_tokens=6, temperature=temperature, ignore_eos=True)
    params = [dataclasses.replace(params, seed=seed) for seed in (3, 4)]
    plain = list(llm.generate([prompt, other], params))
    same = verdict(llm, plain, plain, params, EXACT)
    assert same.lossless and (same.equal, same.tokens) == (12, 12)

    ids, position = plain[1].token_ids, 2
    scores = perturbed_scores(tiny_target, [*other, *ids[:position]], params[1])
    second, first = np.argsort(scores)[-2:]
    assert first == ids[position]
    changed = [*ids[:position], int(second), *ids[position + 1 :]]
    texts = [plain[0], dataclasses.replace(plain[1], token_ids=changed)]
    found = verdict(llm, texts, plain, params, EXACT)
    (one,) = found.differences
    assert (found.equal, found.tokens, found.lossless) == (8, 12, False)
    assert (one.prompt, one.position, one.tree, one.plain) == (1, 2, second, first)
    assert one.gap == pytest.approx(scores[first] - scores[second], abs=1e-4)
    assert "NOT LOSSLESS: 1 of the texts" in str(found) and "prompt 1" in str(found)
    # Rounding that moves scores by as much explains it.
    scale = temperature or 1.0
    wide = dataclasses.replace(EXACT, logits=one.gap * scale / 3.9)
    found = verdict(llm, texts, plain, params, wide)
    assert found.lossless and "near ties: 1." in str(found)
    narrow = dataclasses.replace(EXACT, logits=one.gap * scale / 4.1)
    assert not verdict(llm, texts, plain, params, narrow).lossless


def test_a_text_that_ends_early_is_no_tie(llm):
    params = [SamplingParams(max_tokens=6, ignore_eos=True)]
    plain = list(llm.generate([[5, 9, 14]], params))
    short = [dataclasses.replace(plain[0], token_ids=plain[0].token_ids[:4])]
    wide = dataclasses.replace(EXACT, logits=1e9)
    found = verdict(llm, short, plain, params, wide)
    (one,) = found.differences
    assert not found.lossless and found.equal == one.position == 4
    assert one.tree is None and one.gap is None
    assert found.as_dict()["differences"][0]["is_tie"] is False
