"""Logits of `transformers`, from the files of tests/golden/make_golden.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.support import forward
from treespec_jax.checkpoints import load
from treespec_jax.models.views import CacheView, Pages

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
CHUNK, PAGE, TOLERANCE = 7, 16, 1e-4


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    with np.load(GOLDEN / request.param / "golden.npz") as file:
        return load(GOLDEN / request.param, "float32"), dict(file)


def write_pages(pages, page_table, kv_BK2TH, start):
    """Puts rows start, start + 1, … of every slot where the page table says."""
    for b in range(kv_BK2TH.shape[0]):
        for t in range(kv_BK2TH.shape[3]):
            at = start + t
            pages[page_table[b, at // PAGE], :, :, at % PAGE] = kv_BK2TH[b, :, :, t]


def check(name, found, expected):
    error = np.abs(np.asarray(found) - expected).max()
    print(f"largest error of {name}: {error:.1e}")
    assert error < TOLERANCE


def test_full_forward(golden):
    loaded, file = golden
    found, _ = forward(loaded.model, file["tokens"])
    check(loaded.source, found, file["logits"])


def test_prefill_and_a_tree_through_pages(golden):
    """Chunks of a chain, then both ends of the text as a tree, all of one shape."""
    loaded, file = golden
    config, tokens, branch = loaded.config, file["tokens"], file["branch"]
    rows, side = tokens.shape[1], branch.shape[1]
    prefix = rows - side - 1
    assert prefix % CHUNK == 0 and 1 + 2 * side == CHUNK
    # A page table with neither order nor neighbours, and one page that nobody owns.
    table = np.array([[4, 1], [2, 5]], np.int32)
    shape = (6, config.num_kv_heads, 2, PAGE, config.head_dim)
    # Unused rows hold NaN, to show that nothing reads them.
    caches = [np.full(shape, np.nan, np.float32) for _ in range(config.num_layers)]

    def run(ids, at, **tree):
        lengths = jnp.full((2,), at, jnp.int32)
        pages = Pages(tuple(map(jnp.array, caches)))
        view = CacheView(pages, jnp.asarray(table), lengths)
        return forward(loaded.model, ids, at, view, **tree)

    for at in range(0, prefix, CHUNK):
        found, kv = run(tokens[:, at : at + CHUNK], at)
        check(loaded.source, found, file["logits"][:, at : at + CHUNK])
        for pages, new in zip(caches, kv, strict=True):
            write_pages(pages, table, np.asarray(new), at)

    # The root, then by turns a node of the text and one of the branch.
    ends = np.stack([tokens[:, -side:], branch], axis=2).reshape(2, -1)
    ids = np.concatenate([tokens[:, prefix : prefix + 1], ends], axis=1)
    depths = [0] + [1 + i // 2 for i in range(2 * side)]
    mask = np.eye(CHUNK, dtype=bool)
    for node in range(1, CHUNK):
        mask[node] |= mask[max(node - 2, 0)]
    found, _ = run(ids, prefix, depths=depths, mask=mask)
    check(loaded.source, found[:, 0], file["logits"][:, prefix])
    check(loaded.source, found[:, 1::2], file["logits"][:, -side:])
    check(loaded.source, found[:, 2::2], file["branch_logits"])


def test_low_precision_stays_close():
    loaded = load(GOLDEN / "llama_grouped", "bfloat16")
    leaves = jax.tree.leaves(loaded.model)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    with np.load(GOLDEN / "llama_grouped" / "golden.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    found, _ = forward(loaded.model, tokens)
    assert np.abs(np.asarray(found) - expected).mean() < 0.03
