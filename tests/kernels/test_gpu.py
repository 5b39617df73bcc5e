"""The GPU kernel: interpreted against float64 numpy, and lowered for cuda."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import AttentionSpec, Operands, gpu, tree_attention
from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes, default_sizes
from pallas_kernels.tree_attention.operands import Shape
from tests.kernels.oracle import attention, cast, make_case
from tests.kernels.triton_modules import lower_for_cuda, triton_modules

pytestmark = pytest.mark.slow

# Small blocks: tests of one tile and one block would prove little.
SIZES = GpuBlockSizes(rows=16, keys=16, warps=4, stages=2, programs=1, split_rows=32)


def split(sizes: GpuBlockSizes, tiles: int) -> GpuBlockSizes:
    """Three parts of the prefix where there are `tiles` programs otherwise."""
    return dataclasses.replace(sizes, programs=3 * tiles)


def attend(case, **options):
    """The compiled, interpreted kernel as a function of a case."""
    given = {"block_sizes": SIZES, "scale": case.dims.H**-0.5, **options}
    spec = AttentionSpec(implementation="gpu", interpret=True, **given)
    return jax.jit(functools.partial(tree_attention, spec=spec))


def run(case, dtype=np.float32, **options) -> np.ndarray:
    out = attend(case, **options)(cast(case, dtype))
    assert out.dtype == dtype and out.shape == case.queries.shape
    return np.asarray(out, np.float64)


def check(case, window=None, soft_cap=None, **options) -> np.ndarray:
    """float32 to 2e-5; returns what the kernel gave."""
    out = run(case, window=window, soft_cap=soft_cap, **options)
    scale = case.dims.H**-0.5
    want = attention(case, scale=scale, window=window, soft_cap=soft_cap)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)
    return out


def ragged(rng, *, page, many, **shape):
    """One slot of each kind of length: none, about a page, and many pages."""
    lengths = (0, 1, page - 1, page, page + 1, many)
    max_pages = -(-many // page)
    shape = {"K": 1, "max_pages": max_pages, **shape}
    return make_case(rng, B=6, page=page, lengths=lengths, **shape)


def ids(value):
    return "-".join(f"{k}{v}" for k, v in value.items())


SHAPES = [
    {"T": 1, "G": 1, "H": 64, "page": 16, "many": 83},
    # Pages that blocks do not divide, and a head width that needs a mask.
    {"T": 5, "G": 3, "H": 96, "page": 24, "many": 83, "parts": 3},
    # Several tiles of queries, and several parts of the prefix.
    {"T": 19, "G": 2, "H": 64, "page": 32, "many": 100, "scratch": 7, "parts": 3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_oracle(shape):
    """Random trees over ragged, scattered prefixes: what the common grid leaves out."""
    shape = dict(shape)
    parts = shape.pop("parts", 1)
    case = ragged(np.random.default_rng(shape["T"]), **shape)
    tiles = -(-shape["T"] * shape["G"] // 16) * 6
    sizes = split(SIZES, tiles) if parts > 1 else SIZES
    assert sizes.splits(tiles, case.page_table.shape[1] * shape["page"]) >= min(
        2, parts
    )
    check(case, block_sizes=sizes)


def relative_error(out, want) -> float:
    return np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)


def test_float16_is_close():
    """Relative norm of the error at most 2e-2, inputs rounded alike."""
    rng = np.random.default_rng(1)
    case = cast(ragged(rng, T=5, G=4, H=128, page=16, many=83), np.float16)
    out = run(case, np.float16)
    assert relative_error(out, attention(case, scale=128**-0.5)) < 2e-2


def used_rows(case) -> np.ndarray:
    """Bool [P, page]: the rows of pages that hold a slot's prefix."""
    P, _, _, page, _ = case.kv_pages.shape
    used = np.zeros((P, page), bool)
    for b, length in enumerate(case.lengths):
        at = np.arange(length)
        used[case.page_table[b, at // page], at % page] = True
    return used


@pytest.mark.parametrize("keys, parts", [(16, 3), (64, 1)])
def test_rows_that_are_not_used_are_not_read(keys, parts):
    """NaN in pages past a length and in the rest of a last page; the table there
    names pages that do not exist."""
    rng = np.random.default_rng(3)
    case = ragged(rng, T=5, G=2, H=64, page=16, many=83, max_pages=8)
    pages, table = case.kv_pages.copy(), case.page_table.copy()
    at, row = np.nonzero(~used_rows(case))
    assert len(at) > 100
    pages[at, :, :, row] = np.nan
    for b, length in enumerate(case.lengths):
        table[b, -(-length // 16) :] = 10**6
    sizes = dataclasses.replace(SIZES, keys=keys)
    call = attend(case, block_sizes=sizes if parts == 1 else split(sizes, 6))
    clean = call(cast(case))
    dirty = dataclasses.replace(case, kv_pages=pages, page_table=table)
    np.testing.assert_array_equal(call(cast(dirty)), clean)
    assert np.isfinite(clean).all()


def test_pages_before_every_window_are_not_read():
    rng = np.random.default_rng(4)
    case = make_case(rng, B=2, T=3, G=2, page=16, lengths=(150, 20), K=1, H=64)
    call = attend(case, window=20)
    clean = call(cast(case))
    # The least deep node stands at 150 and sees 131 and on: block 8 of 16 rows.
    pages = case.kv_pages.copy()
    pages[case.page_table[0, :8]] = np.nan
    dirty = dataclasses.replace(case, kv_pages=pages)
    np.testing.assert_array_equal(call(cast(dirty)), clean)
    pages[case.page_table[0, 8]] = np.nan
    assert np.isnan(call(cast(dirty))).any()


def test_a_chunk_of_prefill_equals_the_reference():
    """512 rows: several tiles of queries and blocks of tree."""
    rng = np.random.default_rng(7)
    case = make_case(rng, B=1, T=512, G=1, page=64, lengths=(70,), K=1, H=64)
    case.tree_mask[0] = np.tril(np.ones((512, 512), bool))
    sizes = GpuBlockSizes(rows=128, keys=64, programs=1)
    out = run(case, block_sizes=sizes)
    spec = AttentionSpec(scale=0.125, implementation="reference")
    want = jax.jit(tree_attention, static_argnums=1)(cast(case), spec)
    np.testing.assert_allclose(out, want, atol=2e-5, rtol=2e-5)


def abstract(*, T, E=0, int8=False, **shape) -> Operands:
    """Abstract operands at the shape of Llama 3 8B unless told otherwise."""
    shape = Shape(prefix=8192, **shape)
    operands, array = shape.operands(T), jax.ShapeDtypeStruct
    B, _, _, H, K, _, _ = operands.dims
    pages, scales = operands.kv_pages, None
    if int8:
        scales = array(pages.shape[:4], jnp.float32)
        pages = array(pages.shape, jnp.int8)
    return dataclasses.replace(
        operands,
        kv_pages=pages,
        kv_scales=scales,
        tree_kv=array((B, K, 2, T + E, H), shape.dtype),
        tree_mask=array((B, T, T + E), jnp.bool_),
        tree_depth=array((B, T + E), jnp.int32),
    )


LOWERED = [
    *({"T": T} for T in (1, 16, 64, 128)),
    {"T": 512, "slots": 1},
    {"T": 5, "E": 3, "head_dim": 96, "group": 3, "page": 16},
    {"T": 16, "head_dim": 64, "group": 1, "page": 256, "window": 1024},
    {"T": 16, "head_dim": 256, "group": 16, "page": 48, "soft_cap": 30.0},
    {"T": 1, "int8": True},
    {"T": 64, "int8": True, "page": 16, "window": 1024},
    {"T": 16, "head_dim": 256, "dtype": "float32"},
    {"T": 16, "dtype": "float16"},
]


@pytest.mark.parametrize("shape", LOWERED, ids=ids)
def test_lowers_for_cuda(shape):
    """At full size, chosen by the platform; Triton's verifier is content."""
    shape = dict(shape)
    spec = AttentionSpec(
        scale=0.1,
        window=shape.pop("window", None),
        soft_cap=shape.pop("soft_cap", None),
    )
    attention = functools.partial(tree_attention, spec=spec)
    (text,) = triton_modules(lower_for_cuda(attention, abstract(**shape)))
    products = [line for line in text.splitlines() if "tt.dot " in line]
    # Two products in each loop: whole blocks, partial ones, the tree.
    assert len(products) == (8 if spec.window else 6)
    dtype = shape.get("dtype", "bfloat16")
    assert all(("tf32" not in line) for line in products) or dtype != "float32"
    width = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    assert all(f"x{width}> *" in line for line in products)


def test_splits_fill_the_device_and_no_more():
    sizes = GpuBlockSizes(programs=264, split_rows=512)
    assert sizes.splits(tiles=64, prefix_rows=8192) == 4
    assert sizes.splits(tiles=8, prefix_rows=8192) == 16
    assert sizes.splits(tiles=300, prefix_rows=8192) == 1
    assert sizes.splits(tiles=1, prefix_rows=0) == 1


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", None, "?"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_default_sizes_fit_the_call(kind, width):
    for itemsize, rows in [(2, 1), (2, 33), (2, 64), (2, 8192), (4, 8), (4, 1000)]:
        sizes = default_sizes(itemsize, rows, width, kind)
        assert sizes.rows >= min(rows, 16) and sizes.rows < max(32, 2 * rows)
        assert sizes.programs % (108 if kind and "A100" in kind else 132) == 0


@pytest.mark.parametrize(
    "field, value", [("rows", 24), ("keys", 8), ("warps", 3), ("stages", 0)]
)
def test_sizes_check_themselves(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        GpuBlockSizes(**{field: value})


def refusal(**changes) -> str:
    """Why a call that fits the contract cannot run, by shapes alone."""
    operands = dataclasses.replace(abstract(T=1), **changes)
    named, chosen = (
        functools.partial(
            tree_attention, spec=AttentionSpec(scale=0.1, implementation=name)
        )
        for name in ("gpu", None)
    )
    with pytest.raises(ValueError, match="the GPU kernel cannot run: ") as caught:
        jax.eval_shape(named, operands)
    # Without a name the reference takes it.
    jax.eval_shape(chosen, operands)
    return str(caught.value)


def test_what_the_kernel_cannot_take_has_a_reason(monkeypatch):
    shape = jax.ShapeDtypeStruct
    wide = {
        "queries": shape((8, 1, 32, 512), jnp.bfloat16),
        "kv_pages": shape((9, 8, 2, 16, 512), jnp.bfloat16),
        "tree_kv": shape((8, 8, 2, 1, 512), jnp.bfloat16),
    }
    assert "heads 512 wide" in refusal(**wide)
    other = shape((8, 8, 2, 1, 128), jnp.float32)
    assert "tree_kv float32 is not of the type of queries" in refusal(tree_kv=other)
    other = shape((9, 8, 2, 16, 128), jnp.float32)
    assert "kv_pages is float32, want bfloat16" in refusal(kv_pages=other)
    large = {
        "kv_pages": shape((10**5, 8, 2, 16, 128), jnp.int8),
        "kv_scales": shape((10**5, 8, 2, 16), jnp.float32),
    }
    assert "3276800000 bytes of int8 pages" in refusal(**large)
    monkeypatch.setattr(gpu, "plgpu", None)
    assert "no Triton back end" in refusal()
