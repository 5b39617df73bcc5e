"""The kernel by the TPU's own compiler; its figures are estimates, not measurements."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.sizes import choose

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MODELS = {"Llama-3-8B": (8, 4), "Qwen3-32B": (8, 8)}
SLOTS, PAGE, H, MAX_PAGES, POOL = 8, 128, 128, 64, 2003


def arguments(K, G, T, dtype=jnp.bfloat16, B=SLOTS, pool=POOL):
    shape = jax.ShapeDtypeStruct
    return (
        shape((B, T, K * G, H), dtype),
        shape((pool, K, 2, PAGE, H), dtype),
        shape((B, MAX_PAGES), jnp.int32),
        shape((B,), jnp.int32),
        shape((B, K, 2, T, H), dtype),
        shape((B, T, T), jnp.bool_),
    )


def call(aot, topology, **options):
    """The operation as users call it, for one kind of device."""
    kind = aot.device_kind(topology).kind
    return functools.partial(tree_attention, scale=0.1, device_kind=kind, **options)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_and_copies_nothing(tpu_compiler, topology, model):
    """One program of all tree sizes: no copy of a pool, no temporary of its order."""
    K, G = MODELS[model]
    sizes = (1, 16, 64, 128, 256)
    pages = arguments(K, G, 1)[1]
    rest = [arguments(K, G, T)[:1] + arguments(K, G, T)[2:] for T in sizes]
    attend = call(tpu_compiler, topology)

    def all_sizes(pages, rest):
        return [attend(q, pages, *others) for q, *others in rest]

    result = tpu_compiler.compile_for(topology, all_sizes, pages, rest, kernels=False)
    assert result.report.instances == {"tree_attention": len(sizes)}
    assert f"bf16[{POOL},{K},2,{PAGE},{H}]" in result.text
    assert not re.search(rf"= bf16\[{POOL},.*(copy|fusion|transpose)\(", result.text)
    tree = sum(x.size * 2 for others in rest for x in (others[0], others[3]))
    assert result.report.temporary_bytes <= 3 * tree


def block_cost(kernel, sizes, K=8):
    """Bundles and cycles per page of prefix and key/value head, copies' start included.

    The first loop with products is that of blocks that need no mask, or, where it walks
    over the heads, the one inside it; the copies of a block's pages are loops as well.
    """
    loops = kernel.loops
    inner = next(x for x in loops if x.depth > 1 and x.mix.slots["MXU"])
    block = inner if inner.depth == 2 else loops[inner.parent]
    pages = sizes.block_rows // PAGE
    times = {block.index: 1}
    times |= {x.index: pages for x in loops if x.parent == block.index}
    if inner is not block:
        times[inner.index] = K // sizes.unroll
    cost = [
        sum(getattr(loops[i], what) * n for i, n in times.items())
        for what in ("bundles", "cycles")
    ]
    return [c / pages / K for c in cost]


@pytest.mark.slow
@pytest.mark.parametrize("T, bar", [(2, 1.0), (32, 2.0), (64, None)])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_figures(tpu_compiler, topology, T, bar):
    """Per page and head at most so many times the cycles in which 64 KiB come in."""
    K, G = MODELS["Llama-3-8B"]
    kind = tpu_compiler.device_kind(topology)
    attend = call(tpu_compiler, topology)
    report = tpu_compiler.compile_for(topology, attend, *arguments(K, G, T)).report
    kernel = report.kernel("tree_attention")
    assert (kernel.mix.spills, kernel.mix.fills) == (0, 0)
    if bar is not None:
        least = kind.stream_cycles(2 * PAGE * H * 2)
        bundles, cycles = block_cost(kernel, choose(kind.kind, T * G))
        print(
            f"{topology} R={T * G}: {bundles:.0f} bundles {cycles:.0f} cycles "
            f"of {least:.0f}: {bundles / least:.2f} {cycles / least:.2f}"
        )
        assert bundles <= cycles <= bar * least
    prefix = SLOTS * MAX_PAGES * PAGE * K * 2 * H * 2
    new = SLOTS * T * H * 2 * (2 * K + 2 * K * G)
    print(f"bytes: {report.bytes_accessed / (prefix + new):.3f} of the least")
    assert report.bytes_accessed <= 1.05 * (prefix + new)
