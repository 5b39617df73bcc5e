"""Attention in integers: right, and of the same bits however keys are stored."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.tree_attention import (
    AttentionSpec,
    Operands,
    quantize_rows,
    tree_attention,
)
from tests.kernels.contract import Call, as_stored, cases, rounded
from tests.kernels.oracle import attention

CALLS = {
    "int8": Call(T=5, G=2, K=2, H=64, int8=True, page=32, max_pages=5),
    "window": Call(T=5, G=3, H=24, int8=True, window=24, scratch=2),
    "cap": Call(T=1, G=1, H=96, int8=True, soft_cap=1.5),
    "chunk": Call(T=200, G=2, H=16, int8=True, B=2, max_pages=3),
    "page=512": Call(T=2, G=2, H=16, int8=True, page=512, max_pages=3),
}
attend = jax.jit(tree_attention, static_argnums=1)


def spec_of(call: Call) -> AttentionSpec:
    return AttentionSpec(**call.options(), implementation="bitwise")


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_oracle(name):
    """Queries have 10 bits or more, weights 20: the cache's rounding is not in it."""
    call = CALLS[name]
    for case, _ in cases(call):
        rows, scales = (np.asarray(x, np.float64) for x in quantize_rows(case.tree_kv))
        case_of_rows = dataclasses.replace(
            rounded(call, case), tree_kv=rows * scales[..., None]
        )
        want = attention(case_of_rows, **call.options())
        out = np.asarray(attend(as_stored(call, case), spec_of(call)))
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out, want, atol=4e-3)


@pytest.fixture(scope="module")
def text():
    """Rows of 150 tokens, and queries of the last 9: float32."""
    rng = np.random.default_rng(0)
    K, G, H, S = 2, 3, 20, 150
    return rng.normal(size=(9, K * G, H)), rng.normal(size=(K, 2, S, H))


def result(text, first: int, nodes: range, page: int, slots: int = 1, more: int = 0):
    """Attention of some of the last rows, those from `first` on as a tree.

    Args:
      text: see the fixture.
      first: rows before it are cached.
      nodes: rows whose queries are new; those between are scratch.
      page: rows of a page.
      slots: that hold the same text.
      more: pages past the text's.
    """
    queries, rows = text
    K, _, S, H = rows.shape
    end = nodes.stop
    pages = -(-S // page) + more
    # As the tree has them: rounded, and then read again.
    store = np.full((pages + 1, K, 2, page, H), 7.0, np.float32)
    for row in range(first):
        store[pages - row // page, :, :, row % page] = rows[:, :, row]
    kept, scales = quantize_rows(store)
    table = np.arange(pages, 0, -1, dtype=np.int32)
    U, T = end - first, len(nodes)
    mask = np.tril(np.ones((U, U), bool))[U - T :]

    def each(x):
        return np.stack([x] * slots)

    operands = Operands(
        queries=each(queries[[n - S + 9 for n in nodes]].astype(np.float32)),
        kv_pages=kept,
        kv_scales=scales,
        page_table=each(table),
        lengths=np.full(slots, first, np.int32),
        tree_kv=each(rows[:, :, first:end].astype(np.float32)),
        tree_mask=each(mask),
        tree_depth=each(np.arange(U, dtype=np.int32)),
    )
    spec = AttentionSpec(scale=0.3, window=100, implementation="bitwise")
    return np.asarray(attend(operands, spec))[-1]


def test_bits_do_not_depend_on_where_keys_stand(text, optimised_programs):
    """Cached, drafted or in scratch; pages, slots, and queries beside."""
    want = result(text, 141, range(141, 150), 16)
    for page, slots, more in ((64, 1, 0), (8, 5, 3), (256, 2, 0)):
        out = result(text, 141, range(141, 150), page, slots, more)
        assert (out == want).all()
    for first in (0, 60, 141):
        assert (result(text, first, range(141, 150), 32) == want).all()
        assert (result(text, first, range(146, 150), 32) == want[-4:]).all()
    for row in range(141, 150):
        assert (result(text, row, range(row, row + 1), 64)[0] == want[row - 141]).all()


def test_pages_of_floats_are_refused(text):
    call = Call(T=5, G=2, H=64)
    case, _ = next(cases(call))
    with pytest.raises(ValueError, match="wants int8 pages, got float32"):
        attend(as_stored(call, case), spec_of(call))
