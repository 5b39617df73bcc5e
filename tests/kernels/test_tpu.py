"""The kernel by the TPU's own compiler; its figures are estimates, not measurements."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tree_attention import AttentionSpec, tree_attention
from pallas_kernels.tree_attention.operands import Shape

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MODELS = {"Llama-3-8B": (8, 4), "Qwen3-32B": (8, 8)}
SLOTS, PAGE, H, MAX_PAGES, POOL = 8, 128, 128, 64, 2003


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_and_copies_nothing(tpu_compiler, topology, model):
    """One program of all tree sizes: no copy of a pool, no temporary of its order."""
    K, G = MODELS[model]
    sizes = (1, 16, 64, 128, 256)
    shape = Shape(
        slots=SLOTS,
        prefix=MAX_PAGES * PAGE,
        kv_heads=K,
        group=G,
        head_dim=H,
        page=PAGE,
    )
    pages = jax.ShapeDtypeStruct((POOL, K, 2, PAGE, H), jnp.bfloat16)
    calls = [dataclasses.replace(shape.operands(T), kv_pages=None) for T in sizes]
    kind = tpu_compiler.device_kind(topology).kind
    spec = AttentionSpec(scale=0.1, device_kind=kind)

    def all_sizes(pages, calls):
        whole = [dataclasses.replace(call, kv_pages=pages) for call in calls]
        return [tree_attention(call, spec) for call in whole]

    result = tpu_compiler.compile_for(topology, all_sizes, pages, calls, kernels=False)
    assert result.report.instances == {"tree_attention": len(sizes)}
    assert f"bf16[{POOL},{K},2,{PAGE},{H}]" in result.text
    assert not re.search(rf"= bf16\[{POOL},.*(copy|fusion|transpose)\(", result.text)
    tree = sum(x.size * 2 for call in calls for x in (call.queries, call.tree_kv))
    assert result.report.temporary_bytes <= 3 * tree
