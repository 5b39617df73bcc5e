"""The kernel's cost per prefix: bytes against arithmetic, cycles against each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from pallas_kernels import aot
from pallas_kernels.tree_attention import (
    AttentionSpec,
    Operands,
    estimate,
    tree_attention,
)
from pallas_kernels.tree_attention.operands import Shape
from pallas_kernels.tree_attention.sizes import BlockSizes, choose

pytestmark = pytest.mark.slow

K, G, H, PAGE, SLOTS, PAGES = 8, 4, 128, 128, 4, 16


def operands(T, G=G, K=K) -> Operands:
    shape = Shape(slots=SLOTS, prefix=PAGES * PAGE, kv_heads=K, group=G)
    return shape.operands(T)


def compiled(topology, given, spec) -> aot.Report:
    attend = functools.partial(tree_attention, spec=spec)
    return aot.compile_for(topology, attend, given).report


@pytest.fixture(scope="module")
def cost(tpu_compiler):
    """Compiles for v5e; returns the cost, the operands and the settings."""

    @functools.cache
    def measure(T, **options):
        sizes, given = BlockSizes(**options), operands(T)
        spec = AttentionSpec(scale=0.1, implementation="tpu", block_sizes=sizes)
        kernel = compiled("v5e:2x2", given, spec).kernel("tree_attention")
        kind = aot.DEVICE_KINDS["v5e"]
        return estimate.prefix_cost(kernel, kind, given, spec), given, spec

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
    found, given, spec = cost(T, **options)
    assert found.copied == found.least == 128 * 2 * H * 2
    assert 0 < found.mxu_share < 1 < found.bundles < found.cycles
    assert found.stream_cycles == pytest.approx(120, rel=0.01)
    traffic = estimate.call_bytes(found, given, spec, PAGES * PAGE)
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
    kind, given = aot.device_kind("v6e:2x2"), operands(2, K=2)
    spec = AttentionSpec(scale=0.1, device_kind=kind.kind)
    kernel = compiled("v6e:2x2", given, spec).kernel("tree_attention")
    sizes = choose(kind.kind, 2 * G, 2)
    assert sizes.block_rows == 2 * choose(kind.kind, 2 * G).block_rows
    spec = dataclasses.replace(spec, block_sizes=sizes)
    found = estimate.prefix_cost(kernel, kind, given, spec)
    assert kernel.mix.spills == 0 and found.cycles < 1.3 * found.stream_cycles


def test_calls_that_the_kernel_does_not_take(cost):
    found, given, spec = cost(2, block_rows=512, unroll=8)
    pages = given.kv_pages
    odd = jax.ShapeDtypeStruct((*pages.shape[:3], 24, H), pages.dtype)
    given = dataclasses.replace(given, kv_pages=odd)
    with pytest.raises(ValueError, match="24 rows"):
        estimate.call_bytes(found, given, spec, 100)


@pytest.mark.parametrize(
    ("T", "G", "bar"),
    [
        (2, 4, 1.0),
        (16, 4, 1.0),
        (32, 4, 1.0),
        (16, 8, 1.0),
        (64, 4, None),
        (256, 8, None),
    ],
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_figures_of_the_sizes_that_are_chosen(tpu_compiler, topology, T, G, bar):
    """At most so many times the cycles of streaming, and no needless byte.

    Few spills: four cycles more for each make it a fifth more at most.
    The shapes of Llama 3 8B (G = 4) and Qwen3 32B (G = 8).
    """
    kind, given = aot.device_kind(topology), operands(T, G)
    spec = AttentionSpec(scale=0.1, device_kind=kind.kind)
    report = compiled(topology, given, spec)
    kernel = report.kernel("tree_attention")
    spec = dataclasses.replace(spec, block_sizes=choose(kind.kind, T * G))
    found = estimate.prefix_cost(kernel, kind, given, spec)
    if bar is not None:
        assert found.bundles <= found.cycles
        assert found.cycles <= bar * found.stream_cycles
        assert found.cycles + 4 * found.spills <= 1.2 * bar * found.stream_cycles
    least = SLOTS * 2 * H * 2 * (K * PAGES * PAGE + T * K * (G + 1))
    assert report.bytes_accessed <= 1.05 * least
