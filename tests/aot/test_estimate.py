"""The kernel's cost per prefix: bytes against arithmetic, cycles against each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.tree_attention import estimate, tree_attention
from pallas_kernels.tree_attention.sizes import BlockSizes, choose

K, G, H, PAGE, SLOTS, PAGES = 8, 4, 128, 128, 4, 16


def arrays(T, G=G, K=K):
    shape, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
    return (
        shape((SLOTS, T, K * G, H), dtype),
        shape((SLOTS * PAGES + 1, K, 2, PAGE, H), dtype),
        shape((SLOTS, PAGES), jnp.int32),
        shape((SLOTS,), jnp.int32),
        shape((SLOTS, K, 2, T, H), dtype),
        shape((SLOTS, T, T), jnp.bool_),
    )


@pytest.fixture(scope="module")
def cost(tpu_compiler):
    """Compiles for v5e; returns the cost, the arguments and the sizes."""

    @functools.cache
    def measure(T, **options):
        sizes, given = BlockSizes(**options), arrays(T)
        attend = functools.partial(
            tree_attention, scale=0.1, implementation="tpu", block_sizes=sizes
        )
        report = aot.compile_for("v5e:2x2", attend, *given).report
        kernel = report.kernel("tree_attention")
        kind = aot.DEVICE_KINDS["v5e"]
        return estimate.prefix_cost(kernel, kind, given, sizes), given, sizes

    return measure


@pytest.mark.parametrize(
    ("T", "options"),
    [
        (2, dict(block_rows=512, unroll=8)),
        (32, dict(block_rows=256, unroll=1)),
        (32, dict(block_rows=128, unroll=2, heads=4)),
    ],
)
def test_every_row_of_prefix_is_read_once(cost, T, options):
    """However the call is cut up; and with it the call's traffic is the least."""
    found, given, sizes = cost(T, **options)
    assert found.copied == found.least == 128 * 2 * H * 2
    assert 0 < found.mxu_share < 1 < found.bundles < found.cycles
    assert found.stream_cycles == pytest.approx(120, rel=0.01)
    traffic = estimate.call_bytes(found, given, sizes, PAGES * PAGE)
    assert traffic.least == SLOTS * 2 * H * 2 * (K * PAGES * PAGE + T * K * (G + 1))
    assert traffic.least <= traffic.moved <= 1.05 * traffic.least


def test_cost_does_not_depend_on_the_block(cost):
    """Blocks of other lengths: the same work per row, but for the block's overhead."""
    short = cost(32, block_rows=128, unroll=1)[0]
    long = cost(32, block_rows=256, unroll=1)[0]
    assert 0.5 * short.cycles < long.cycles < short.cycles
    narrow = cost(32, block_rows=256, unroll=1, heads=4)[0]
    assert narrow.cycles == pytest.approx(long.cycles, rel=0.1)


def test_blocks_are_longer_where_heads_are_few(tpu_compiler):
    """As on each device of a mesh; by the usual ones 1.6 times as many cycles."""
    kind, given = aot.device_kind("v6e:2x2"), arrays(2, K=2)
    attend = functools.partial(tree_attention, scale=0.1, device_kind=kind.kind)
    report = aot.compile_for("v6e:2x2", attend, *given).report
    kernel, sizes = report.kernel("tree_attention"), choose(kind.kind, 2 * G, 2)
    assert sizes.block_rows == 2 * choose(kind.kind, 2 * G).block_rows
    found = estimate.prefix_cost(kernel, kind, given, sizes)
    assert kernel.mix.spills == 0 and found.cycles < 1.3 * found.stream_cycles


def test_calls_that_the_kernel_does_not_take(cost):
    found, given, sizes = cost(2, block_rows=512, unroll=8)
    q, pages, *rest = given
    odd = jax.ShapeDtypeStruct((*pages.shape[:3], 24, H), pages.dtype)
    with pytest.raises(ValueError, match="24 rows"):
        estimate.call_bytes(found, (q, odd, *rest), sizes, 100)


@pytest.mark.parametrize(
    ("T", "G", "bar"),
    [
        (2, 4, 1.0),
        (32, 4, 2.0),
        (16, 8, 2.0),
        (64, 4, None),
        (256, 8, None),
    ],
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_figures_of_the_sizes_that_are_chosen(tpu_compiler, topology, T, G, bar):
    """At most so many times the cycles of streaming, no spills, and no needless byte.

    The shapes of Llama 3 8B (G = 4) and Qwen3 32B (G = 8).
    """
    kind, given = aot.device_kind(topology), arrays(T, G)
    attend = functools.partial(tree_attention, scale=0.1, device_kind=kind.kind)
    report = aot.compile_for(topology, attend, *given).report
    kernel = report.kernel("tree_attention")
    if T * G <= 256:
        assert (kernel.mix.spills, kernel.mix.fills) == (0, 0)
    found = estimate.prefix_cost(kernel, kind, given, choose(kind.kind, T * G))
    if bar is not None:
        assert found.bundles <= found.cycles <= bar * found.stream_cycles
    least = SLOTS * 2 * H * 2 * (K * PAGES * PAGE + T * K * (G + 1))
    assert report.bytes_accessed <= 1.05 * least
