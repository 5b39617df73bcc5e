"""Logits of Hugging Face's Llama, from the files of tests/golden/make_llama.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.support import forward
from treespec_jax.checkpoints import load
from treespec_jax.models.views import CacheView

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ["llama_grouped", "llama_tied", "llama_theta"]


@pytest.fixture(params=NAMES)
def golden(request):
    with np.load(GOLDEN / request.param / "golden.npz") as file:
        return load(GOLDEN / request.param), file["tokens"], file["logits"]


def write_pages(pages, page_table, kv_BK2TH, start):
    """Puts rows start, start + 1, … of every slot where the page table says."""
    page = pages.shape[3]
    for b in range(kv_BK2TH.shape[0]):
        for t in range(kv_BK2TH.shape[3]):
            at = start + t
            pages[page_table[b, at // page], :, :, at % page] = kv_BK2TH[b, :, :, t]


def test_full_forward(golden):
    loaded, tokens, expected = golden
    found, _ = forward(loaded.model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_prefill_and_continuation_through_pages(golden):
    loaded, tokens, expected = golden
    config = loaded.config
    # A page table with neither order nor neighbours, and one page that nobody owns.
    table = np.array([[4, 1, 6], [2, 5, 0]], np.int32)
    shape = (7, config.num_kv_heads, 2, 16, config.head_dim)
    # Unused rows hold NaN, to show that nothing reads them.
    caches = [np.full(shape, np.nan, np.float32) for _ in range(config.num_layers)]
    found, at = [], 0
    for rows in (14, 24, 1, 1):
        lengths = jnp.full((2,), at, jnp.int32)
        view = CacheView(tuple(map(jnp.asarray, caches)), jnp.asarray(table), lengths)
        logits, kv = forward(loaded.model, tokens[:, at : at + rows], at, view)
        found.append(logits)
        for pages, new in zip(caches, kv, strict=True):
            write_pages(pages, table, np.asarray(new), at)
        at += rows
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_configurations_are_read():
    grouped, tied, theta = (load(GOLDEN / name).config for name in NAMES)
    assert (grouped.num_kv_heads, grouped.queries_per_kv) == (2, 2)
    assert not grouped.tied_embeddings
    assert grouped.norm_eps == 1e-5
    assert tied.tied_embeddings
    assert tied.head_dim == 8 != tied.embed_dim // tied.num_heads
    assert theta.rotary.theta == 500000.0
    assert theta.norm_eps == 1e-6
    assert theta.eos_ids == (2, 5)


def test_low_precision_stays_close():
    loaded = load(GOLDEN / "llama_grouped", "bfloat16")
    leaves = jax.tree.leaves(loaded.model)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    with np.load(GOLDEN / "llama_grouped" / "golden.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    found, _ = forward(loaded.model, tokens)
    assert np.abs(np.asarray(found) - expected).mean() < 0.03
