"""The kernel by the TPU's own compiler; its figures are estimates, not measurements."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tree_attention import tree_attention

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
