"""The one product: any rank of weight, one row or several, and where weights lie."""

from __future__ import annotations

import mmap
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from treespec_jax.models import memory, product_forms
from treespec_jax.models.linear import linear, rows_of

apply = jax.jit(linear, static_argnums=2)


@pytest.mark.parametrize(
    "shape, equation",
    [
        ((6, 24), "od,dr->or"),
        ((2, 5, 24), "pod,dr->por"),
        ((2, 3, 5, 24), "pqod,dr->pqor"),
        ((6, 4, 6), "ohd,hdr->or"),
        ((6, 2, 3, 4), "oxhd,xhdr->or"),
    ],
)
def test_any_rank_equals_einsum(shape, equation):
    """Trailing axes are contracted as far as the activations reach."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=shape), rng.normal(size=(24, 3))
    inner = shape[1:] if "->or" in equation else shape[-1:]
    want = np.einsum(equation, weight, x.reshape(*inner, 3))
    got = apply(weight.astype(np.float32), x.astype(np.float32))
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_one_bfloat16_row_equals_the_same_row_of_two():
    """The padded row changes nothing, whatever the dtype asked for."""
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(3, 40, 64)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(64, 2)), jnp.bfloat16)
    for dtype in (None, jnp.float32):
        both = apply(weight, x, dtype)
        assert both.dtype == (dtype or jnp.bfloat16)
        for row in (0, 1):
            one = apply(weight, x[:, row : row + 1], dtype)
            assert one.shape == (3, 40, 1) and one.dtype == both.dtype
            np.testing.assert_array_equal(
                np.asarray(one[..., 0], np.float32),
                np.asarray(both[..., row], np.float32),
            )


@pytest.mark.parametrize("inputs", [64, 40, 1536])
def test_one_bfloat16_row_as_a_sum(inputs, monkeypatch):
    """Where that was measured to be quick: of the rounded numbers, in float32."""
    rng = np.random.default_rng(4)
    weight = jnp.asarray(rng.normal(size=(2, 5, inputs)), jnp.bfloat16)
    x = rng.normal(size=(inputs, 1)).astype(np.float32)
    monkeypatch.setattr(product_forms, "_measured", {"bfloat16": {1: 1.0, 2: 2.0}})
    run = jax.jit(lambda w, x: linear(w, x)).lower(weight, x)
    lines = run.as_text().splitlines()
    assert not [line for line in lines if "dot_general" in line and "bf16" in line]
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    want = np.asarray(weight, np.float64) @ rounded
    np.testing.assert_allclose(run.compile()(weight, x), want, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA on a CPU")
def test_a_table_of_bfloat16_is_neither_converted_nor_copied():
    """Not even before a loop whose steps read a few rows each; and rows are exact."""
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.normal(size=(40, 64)), jnp.bfloat16)
    tokens = jnp.asarray([3, 39, 3], jnp.int32)
    want = np.asarray(table, np.float32)[np.asarray(tokens)].T
    np.testing.assert_array_equal(rows_of(table, tokens, jnp.float32), want)

    @jax.jit
    def run(table, tokens):
        def body(_, tokens):
            return rows_of(table, tokens, jnp.float32).sum(0).astype(jnp.int32) % 40

        return jax.lax.fori_loop(0, 5, body, tokens)

    lines = run.lower(table, tokens).compile().as_text().splitlines()
    made = [line for line in lines if re.search(r"= (f32|u16|bf16)\[40,64\]", line)]
    made = [line for line in made if re.search(r" (fusion|convert|copy)\(", line)]
    assert not made, made


def test_bfloat16_sums_in_float32():
    """1024 ones and a thousandth each: lost at once if summed in bfloat16."""
    weight = jnp.ones((2, 2048), jnp.bfloat16)
    x = jnp.where(jnp.arange(2048)[:, None] % 2 == 0, 1.0, 2**-9).astype(jnp.bfloat16)
    np.testing.assert_allclose(apply(weight, x, jnp.float32), 1026.0)


class Weights(nnx.Module):
    """A large, a small and a bfloat16 parameter."""

    def __init__(self):
        rng = np.random.default_rng(2)
        # Copied by jax, so that they lie where jax puts them.
        self.large = nnx.Param(jnp.asarray(rng.normal(size=(700, 1024)), jnp.float32))
        self.small = nnx.Param(jnp.arange(8.0))
        self.half = nnx.Param(jnp.ones((1200, 1024), jnp.bfloat16))


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages"
)
def test_huge_pages_keep_values():
    """Large parameters begin at a huge page; all keep value, shape and dtype."""
    weights = Weights()
    names = "large", "small", "half"
    before = {name: np.array(getattr(weights, name)[...]) for name in names}
    memory.use_huge_pages(weights)
    for name, want in before.items():
        value = getattr(weights, name)[...]
        assert value.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(value), want)
    where = weights.large[...].unsafe_buffer_pointer()
    assert where % memory.HUGE_PAGE == 0
    memory.use_huge_pages(weights)
    assert weights.large[...].unsafe_buffer_pointer() == where
    # Still an ordinary array for a compiled program, after the module is gone.
    value = weights.large[...]
    del weights
    total = jax.jit(jnp.sum)(value)
    np.testing.assert_allclose(total, before["large"].sum(), rtol=1e-4)


def test_without_huge_pages_nothing_happens(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    weights = Weights()
    value = weights.large[...]
    memory.use_huge_pages(weights)
    assert weights.large[...] is value
