"""What every implementation of tree attention must give, over one grid of calls.

A call is compiled once and then given several sets of numbers: ragged lengths about
the ends of pages, random trees and degenerate ones. Whatever no slot owns is NaN.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import (
    AttentionSpec,
    BlockSizes,
    GpuBlockSizes,
    Operands,
    page_shape,
    quantize_rows,
    tree_attention,
)
from tests.kernels.oracle import attention, cast, make_case, poison

LANES = 128
attend = jax.jit(tree_attention, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes and options of one compiled call."""

    T: int
    G: int
    H: int = 128
    K: int = 1
    page: int = 16
    B: int = 4
    scratch: int = 0
    max_pages: int = 8
    dtype: str = "float32"
    int8: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sizes: BlockSizes = BlockSizes(block_rows=48, rows=16, max_rows=64)

    def options(self) -> dict:
        return dict(scale=self.H**-0.5, window=self.window, soft_cap=self.soft_cap)

    def length_sets(self):
        """Empty, about a page, several blocks; every slot gets several of them."""
        page, full = self.page, self.page * self.max_pages
        sets = [
            (0, 1, page - 1, page),
            (page + 1, full, 0, 3 * page),
            (full - 1, 0, 2 * page + 3, 0),
            (0, 0, 0, 0),
        ]
        return [lengths[: self.B] for lengths in sets]


CALLS = {
    "decoding": Call(T=1, G=4),
    "one query": Call(T=1, G=1, H=64),
    "tree, H=64": Call(T=7, G=2, H=64, K=2, scratch=3),
    "cap, H=96": Call(T=5, G=3, H=96, soft_cap=1.5),
    "H=256, page=32": Call(T=6, G=2, H=256, page=32, max_pages=5),
    "page=256": Call(T=4, G=2, page=256, max_pages=3),
    "window": Call(T=6, G=2, scratch=2, window=20, max_pages=12),
    "window and cap": Call(T=6, G=2, window=70, soft_cap=2.0, max_pages=12),
    "G=16": Call(T=9, G=16, H=64),
    "heads": Call(
        T=3,
        G=2,
        K=8,
        sizes=BlockSizes(block_rows=32, heads=4, unroll=2, buffers=2),
    ),
    # Blocks of two pieces, tiles of 16 rows.
    "heads in turn": Call(
        T=9,
        G=2,
        K=4,
        page=256,
        max_pages=3,
        sizes=BlockSizes(block_rows=512, rows=16, unroll=4, in_turn=True),
    ),
    "int8 and window, heads in turn": Call(
        T=5,
        G=2,
        K=2,
        int8=True,
        window=300,
        page=128,
        max_pages=5,
        sizes=BlockSizes(block_rows=384, unroll=2, in_turn=True),
    ),
    "chunk": Call(T=512, G=1, H=64, B=2, max_pages=5),
    "int8": Call(T=5, G=2, K=2, int8=True, page=32, max_pages=5),
    "int8, window": Call(T=5, G=2, H=64, int8=True, window=24),
    "bf16": Call(T=7, G=4, K=2, dtype="bfloat16"),
    "bf16 decoding": Call(T=1, G=4, H=64, dtype="bfloat16"),
    "bf16 rows": Call(T=24, G=4, dtype="bfloat16", window=40),
    "bf16 int8": Call(T=5, G=2, K=2, dtype="bfloat16", int8=True, soft_cap=3.0),
}


class TreeAttentionContract:
    """Equals float64 numpy; subclassed once per implementation.

    Attributes:
      implementation: its name.
      interpret: as in `AttentionSpec`.
      joins: whether a key and its value may share a row.
    """

    implementation: str
    interpret: bool | object = False
    joins = True

    def block_sizes(self, call: Call) -> BlockSizes | GpuBlockSizes | None:
        """How this implementation cuts a call up; None where it does not."""
        return None

    def run(self, call: Call, case: Operands, **changes) -> np.ndarray:
        """Runs the operation; `changes` are of the settings."""
        settings = dict(
            implementation=self.implementation,
            block_sizes=self.block_sizes(call),
            interpret=self.interpret,
        )
        spec = AttentionSpec(**call.options(), **settings | changes)
        operands = as_stored(call, case, self.joins)
        out = attend(operands, spec)
        assert out.dtype == operands.queries.dtype
        assert out.shape == operands.queries.shape
        return np.asarray(out, np.float64)

    @pytest.mark.parametrize("name", CALLS)
    def test_equals_the_oracle(self, name):
        """Also rows that see nothing are zeros: the oracle's are."""
        call = CALLS[name]
        for case, want in cases(call):
            check(call, self.run(call, case), want)


def as_stored(call: Call, case: Operands, joins: bool = True) -> Operands:
    """Pads pages to whole lanes as their owner does, and quantises on request."""
    operands = cast(case, jnp.dtype(call.dtype))
    pages, scales = operands.kv_pages, None
    if call.int8:
        pages, scales = (np.asarray(x) for x in quantize_rows(case.kv_pages))
        scales = pad(scales, LANES)
    P, K, _, page, H = pages.shape
    if joins and page_shape(P, K, page, H, LANES)[2] == 1:
        pages = np.concatenate([pages[:, :, :1], pages[:, :, 1:]], axis=-1)
    return dataclasses.replace(operands, kv_pages=pad(pages, LANES), kv_scales=scales)


def pad(x, to):
    short = -x.shape[-1] % to
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])


def cases(call: Call):
    """Poisoned cases of a call, and the float64 results of their rounded numbers."""
    rng = np.random.default_rng([call.T, call.G, call.H, call.page])
    for i, lengths in enumerate(call.length_sets()):
        case = make_case(
            rng,
            B=call.B,
            T=call.T,
            G=call.G,
            page=call.page,
            lengths=lengths,
            K=call.K,
            H=call.H,
            scratch=call.scratch,
            max_pages=call.max_pages,
        )
        if i % 2:
            degenerate(case)
        case = cast(poison(case), jnp.dtype(call.dtype))
        yield case, attention(rounded(call, case), **call.options())


def degenerate(case: Operands) -> None:
    """A chain, a star, a lone root with padding, a random tree with padding."""
    B, T, U = case.tree_mask.shape
    for b in range(B):
        mask, depth = case.tree_mask[b], case.tree_depth[b]
        if b == 0:
            mask[:] = np.tril(np.ones((U, U), bool))[U - T :]
            depth[:] = np.arange(U)
        elif b == 1:
            mask[:] = np.eye(U, dtype=bool)[U - T :]
            mask[:, 0] = True
            depth[:] = np.minimum(np.arange(U), 1)
        elif b == 2:
            mask[1:] = False
        else:
            mask[T // 2 :] = False


def rounded(call: Call, case: Operands) -> Operands:
    """What an int8 cache holds."""
    if not call.int8:
        return case
    rows, scales = (np.asarray(x, np.float64) for x in quantize_rows(case.kv_pages))
    with np.errstate(invalid="ignore"):
        return dataclasses.replace(case, kv_pages=rows * scales[..., None])


def check(call: Call, out: np.ndarray, want: np.ndarray) -> None:
    assert np.isfinite(out).all()
    if call.dtype == "float32":
        np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)
    else:
        norm = np.linalg.norm(want)
        assert np.linalg.norm(out - want) <= 2e-2 * norm
