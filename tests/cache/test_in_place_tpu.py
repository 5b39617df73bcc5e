"""The TPU compiler's word that a commit is in place: XLA needs no kernel for it."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tree_attention import AttentionSpec, Operands, tree_attention
from treespec_jax.cache import pages as paging
from treespec_jax.models.views import Pages

POOL, B, T, K, G, H, PAGE, LAYERS = 2003, 8, 32, 8, 4, 128, 128, 2
# Rows only: scales are small, and XLA may move them through faster memory.
POOLED = re.compile(rf"= \(?\w+\[{POOL},\d+,2,{PAGE},{H}\]\S* ([\w-]+)\(")


def step(rows, pages, table, lengths, q, kv, mask, path, count):
    """Per layer one read of the pages, and then all writes, as the engine has it."""
    spec = AttentionSpec(scale=0.1, implementation="tpu")
    for layer, new in zip(pages, kv, strict=True):
        whole, scales = layer if isinstance(layer, tuple) else (layer, None)
        operands = Operands(
            queries=q,
            kv_pages=whole,
            page_table=table,
            lengths=lengths,
            tree_kv=new,
            tree_mask=mask,
            kv_scales=scales,
        )
        q += tree_attention(operands, spec)
    after = q[0, 0, 0, 0] < jnp.inf
    path = path[:, :rows]
    destination = paging.Destination(table, lengths, count)
    pages = paging.commit(Pages(pages), destination, kv, path, after)
    return q, pages.layers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [5, 32], ids=["row writes", "scatter"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_no_copy_of_the_cache(tpu_compiler, topology, rows, dtype):
    assert (B * rows > paging.MAX_ROW_WRITES) == (rows == 32)
    shape = jax.ShapeDtypeStruct
    layer = shape((POOL, K, 2, PAGE, H), jnp.dtype(dtype))
    if dtype == "int8":
        layer = layer, shape((POOL, K, 2, PAGE), jnp.float32)
    args = (
        (layer,) * LAYERS,
        shape((B, 64), jnp.int32),
        shape((B,), jnp.int32),
        shape((B, T, K * G, H), jnp.bfloat16),
        (shape((B, K, 2, T, H), jnp.bfloat16),) * LAYERS,
        shape((B, T, T), jnp.bool_),
        shape((B, T), jnp.int32),
        shape((B,), jnp.int32),
    )
    result = tpu_compiler.compile_for(
        topology, functools.partial(step, rows), *args, donate_argnums=0, kernels=False
    )
    made = set(POOLED.findall(result.text))
    assert "parameter" in made, "the pool has another shape: a dead test"
    assert made & {"dynamic-update-slice", "scatter", "fusion"}
    assert not [what for what in made if what.startswith(("copy", "transpose"))]
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0]))
    assert result.report.aliased_bytes >= cache
    assert result.report.temporary_bytes < cache / LAYERS / 8, "as large as a layer"
