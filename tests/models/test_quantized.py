"""Weights in int8: what they stand for, and products that no other row changes."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from treespec_jax.errors import UserError
from treespec_jax.models import product_choice, product_forms
from treespec_jax.models.linear import linear, rows_of, weight_of
from treespec_jax.models.quantized import Quantized, quantize, signed
from treespec_jax.models.weight_types import types_of

apply = jax.jit(linear, static_argnums=2)
KINDS = ["int8", "int8:32"]


def numbers(weight: Quantized) -> np.ndarray:
    """What a weight stands for, float64 [*out, I]."""
    wide = np.asarray(weight.values, np.float64) * np.asarray(weight.scales)[..., None]
    return np.moveaxis(wide, 0, -2).reshape(*wide.shape[1:-1], -1)


@pytest.fixture(scope="module", params=KINDS)
def weight(request):
    values = np.random.default_rng(0).normal(size=(2, 40, 96)).astype(np.float32)
    return weight_of(jnp.asarray(values), types_of("float32", request.param), 1)


@pytest.mark.parametrize(("kind", "groups"), [("int8", 1), ("int8:32", 3)])
def test_a_weight_is_within_half_a_step(kind, groups):
    """Of its scale's grid, the largest of every scale at 127; zeros stay zeros."""
    values = np.random.default_rng(1).normal(size=(5, 12, 8))
    values[2] = 0.0
    inputs, types = 2, types_of("float32", kind)
    found = quantize(values, inputs, types.groups(96))
    assert found.values.shape == (groups, 5, 96 // groups)
    assert found.shape == (5, 12, 8) and found.values.dtype == np.int8
    error = np.abs(numbers(found) - values.reshape(5, 96)).reshape(5, groups, -1)
    assert (0.5001 * found.scales >= error.max(-1).T).all()
    top = np.abs(found.values).max(-1)
    assert (np.delete(top, 2, axis=1) == 127).all() and not found.values[:, 2].any()


def test_rounding_what_is_rounded_changes_nothing(weight):
    again = quantize(numbers(weight), 1, weight.scales.shape[0])
    np.testing.assert_array_equal(again.values, weight.values)
    np.testing.assert_array_equal(again.scales, weight.scales)


def test_groups_are_of_equal_size():
    """Of at most 128 inputs; 576 are not divided by 128, but by 96."""
    types = types_of("float32", "int8:128")
    assert [types.groups(n) for n in (128, 64, 768, 576, 97)] == [1, 1, 6, 6, 1]


def test_product_is_of_rounded_rows(weight):
    """The oracle rounds rows and sums integers in float64."""
    x = np.random.default_rng(2).normal(size=(96, 3)).astype(np.float32)
    groups = weight.scales.shape[0]
    wide = x.reshape(groups, -1, 3)
    step = np.abs(wide).max(1, keepdims=True) / 127
    rounded = (np.rint(wide / step) * step).reshape(96, 3)
    want = np.einsum("poi,ir->por", numbers(weight), rounded)
    np.testing.assert_allclose(apply(weight, x), want, atol=1e-4)
    full = np.einsum("poi,ir->por", numbers(weight), x)
    assert np.abs(want - full).max() > 1e-3, "nothing is rounded: a dead test"


def test_rows_beside_change_no_bit(weight):
    """Integer sums do not care about order: 1, 2, 8, 16 rows and more."""
    x = np.random.default_rng(3).normal(size=(96, 40)).astype(np.float32)
    one = [np.asarray(apply(weight, x[:, j : j + 1]))[..., 0] for j in range(40)]
    for rows in (2, 8, 15, 16, 40):
        found = np.asarray(apply(weight, x[:, :rows]))
        for j in range(rows):
            np.testing.assert_array_equal(found[..., j], one[j])


def with_offset(weight: Quantized) -> Quantized:
    """The same weight in uint8."""

    class Holder(nnx.Module):
        def __init__(self):
            self.matrix = nnx.Param(weight)

    holder = Holder()
    product_choice.add_offset(holder)
    found = holder.matrix.get_value()
    assert found.values.dtype == np.uint8
    return found


def test_an_offset_changes_no_bit(weight):
    """uint8 weights, 128 too large: products, rows of a table, and what is saved."""
    x = np.random.default_rng(3).normal(size=(96, 40)).astype(np.float32)
    other = with_offset(weight)
    for rows in (1, 2, 8, 15, 16, 40):
        found = apply(other, x[:, :rows])
        np.testing.assert_array_equal(found, apply(weight, x[:, :rows]))
    ids = jnp.asarray([3, 39, 3])
    tables = [rows_of(matrix[0], ids, jnp.float32) for matrix in (weight, other)]
    np.testing.assert_array_equal(*tables)
    np.testing.assert_array_equal(signed(other.values), weight.values)


@pytest.mark.parametrize("inputs", [96, 520, 512, 4192])
def test_one_row_as_a_sum_changes_no_bit(weight, inputs, monkeypatch):
    """Where that was measured to be quick; a short row, or an odd one, is padded."""
    rng = np.random.default_rng(5)
    if inputs != 96:
        grouped = len(weight.scales) > 1 and inputs == 512
        types = types_of("float32", "int8:32" if grouped else "int8")
        values = jnp.asarray(rng.normal(size=(3, inputs)).astype(np.float32))
        weight = weight_of(values, types, 1)
    x = rng.normal(size=(inputs, 16)).astype(np.float32)
    # The largest product there is, at every column.
    x[:, 1] = np.where(rng.random(inputs) < 0.5, 1.0, -1.0)
    want = np.asarray(apply(weight, x[:, :2]))
    tables = dict.fromkeys(("int8", "uint8"), {1: 1.0, 2: 2.0, 8: 2.0, 16: 2.0})
    monkeypatch.setattr(product_forms, "_measured", tables)
    for matrix in (weight, with_offset(weight)):
        for rows in (1, 2, 8, 16):
            # A function of its own: what was traced with another table stays away.
            run = jax.jit(lambda w, x: linear(w, x)).lower(matrix, x[:, :rows])
            dots = "stablehlo.dot_general" in run.as_text()
            assert dots == (rows > 1 or inputs in (96, 520))
            found = run.compile()(matrix, x[:, :rows])
            np.testing.assert_array_equal(found[..., :2], want[..., :rows])
            if rows == 1:
                found = run.compile()(matrix, x[:, 1:2])
                np.testing.assert_array_equal(found[..., 0], want[..., 1])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA on a CPU")
@pytest.mark.parametrize("dtype", ["int8", "uint8", "bfloat16"])
def test_one_row_reads_the_weight_as_it_is_in_every_step(dtype):
    """XLA would convert it before a loop of several steps, and read twice the bytes."""
    weight = jnp.ones((400, 768), dtype)
    x = jnp.ones((768, 1), "bfloat16" if dtype == "bfloat16" else "int8")

    @jax.jit
    def run(weight, x):
        def step(_, x):
            y = product_forms.product(weight, x, jnp.float32)
            return x + (y.sum() > 1e30).astype(x.dtype)

        return jax.lax.fori_loop(0, 5, step, x)

    memory = run.lower(weight, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < weight.nbytes / 2


def test_an_offset_is_one_product_of_both_types(weight):
    """XLA multiplies uint8 and int8 as they are; converted to int32 it is slow."""
    x = jnp.ones((96, 2), jnp.float32)
    text = jax.jit(linear).lower(with_offset(weight), x).as_text()
    (dot,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "ui8>" in dot and "i8>" in dot and "i32>" in dot


def test_other_activations_multiply_converted_weights(weight):
    """bfloat16 rows are rounded on a CPU too; elsewhere weights are converted."""
    x = np.random.default_rng(4).normal(size=(96, 2)).astype(jnp.bfloat16)
    found = apply(weight, x, jnp.float32)
    wide = apply(weight, x.astype(np.float32))
    np.testing.assert_array_equal(found, wide)
    text = (
        jax.jit(linear).trace(weight, x).lower(lowering_platforms=("cuda",)).as_text()
    )
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 1 and dots[0].count("bf16") == 2
    # With rows rounded everywhere there is one form, that of a CPU.
    rounding = dataclasses.replace(weight, rounds_rows=True)
    np.testing.assert_array_equal(apply(rounding, x, jnp.float32), found)
    assert rounding[0].rounds_rows, "a part of it is another weight"
    for platform in ("cuda", "tpu"):
        lowered = (
            jax.jit(linear).trace(rounding, x).lower(lowering_platforms=(platform,))
        )
        (dot,) = [x for x in lowered.as_text().splitlines() if "dot_general" in x]
        assert "bf16" not in dot and dot.count("i8>") == 2 and "i32>" in dot


def test_embedding_rows(weight):
    table = weight[0]
    rows = rows_of(table, jnp.asarray([3, 39, 3]), jnp.float32)
    np.testing.assert_allclose(rows, numbers(weight)[0, [3, 39, 3]].T, rtol=1e-6)
    one = rows_of(table, jnp.asarray([39]), jnp.float32)
    np.testing.assert_array_equal(one, rows[:, 1:2])
    # Not by a slice, for which a TPU's compiler copies the table.
    lowered = jax.jit(rows_of, static_argnums=2).lower(table, jnp.asarray([39]), "f4")
    assert "tensor<2x" in lowered.as_text().split("gather", 1)[1].splitlines()[0]


@pytest.mark.parametrize("name", ["int4", "int8:", "int8:0", "int8:x", 8])
def test_unknown_types_are_named(name):
    with pytest.raises(UserError, match=f"weights must be one of .* got {name!r}"):
        types_of("float32", name)


def test_blocks_hold_all_rows():
    """In one block unless the table says that several are clearly quicker."""
    table = {2: 1.0, 8: 1.2, 15: 2.0, 16: 4.0, 32: 5.0}
    for rows in range(1, 70):
        sizes = product_forms.cut(rows, table)
        assert sum(sizes) >= rows and sum(sizes) - rows < max(sizes)
    cases = {1: (2,), 3: (8,), 9: (15,), 16: (8, 8), 17: (15, 2), 32: (32,)}
    assert {rows: product_forms.cut(rows, table) for rows in cases} == cases
    assert product_forms.cut(33, table) == (33,)
    assert product_forms.padded(16, {**table, 16: 1.0}) == 16
    # No type is cut on a table that was not measured.
    for dtype in ("float32", "bfloat16", "int8", "uint8", "float16"):
        assert all(len(product_forms.blocks(rows, dtype)) == 1 for rows in range(1, 70))
    assert product_forms.blocks(1, "int8") == (2,)


def test_a_measured_table_is_kept(tmp_path, monkeypatch):
    """Another process reads it from the folder."""
    monkeypatch.setattr(product_forms, "_measured", {})
    monkeypatch.setattr(product_forms, "_ROWS", (1, 2, 8, 16, 32))
    first = product_forms.measure("int8", tmp_path)
    other = product_forms._measured["uint8"]
    # Types are compared by few counts; the quicker one is timed with all others too.
    assert set(first) & set(other) == {1, 2, 4, 8, 16}
    assert set(first) ^ set(other) == {32}
    assert first[1] == other[1] and all(ms > 0 for ms in first.values())
    common = set(first) & set(other)
    totals = [sum(table[rows] for rows in common) for table in (first, other)]
    assert (32 in first) == (totals[0] <= totals[1])
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    kept["int8"]["16"] = 1234.5
    file.write_text(json.dumps(kept))
    assert product_forms.measure("int8", tmp_path) == first
    monkeypatch.setattr(product_forms, "_measured", {})
    assert product_forms.measure("int8", tmp_path)[16] == 1234.5
    assert product_forms.blocks(16, "int8") != (16,)
    file.write_text("damaged")
    monkeypatch.setattr(product_forms, "_measured", {})
    assert product_forms.measure("int8", tmp_path)[16] < 1000


class Matrices(nnx.Module):
    """A matrix in int8, and a norm."""

    def __init__(self, weight):
        self.matrix = nnx.Param(weight)
        self.norm = nnx.Param(jnp.ones(96, jnp.bfloat16))


@pytest.mark.parametrize(
    ("rounded", "chosen"),
    [
        ({1: 1.0, 64: 1.5}, True),
        # A tree is slower by more than plain steps are quicker.
        ({1: 0.5, 64: 3.5}, False),
        # Not worth rounding.
        ({1: 0.95, 64: 1.95}, False),
    ],
)
def test_one_form_for_all_row_counts(monkeypatch, tmp_path, weight, rounded, chosen):
    """By the sum of times; all matrices of a model alike, whatever the rows."""
    asked = []

    def timed(device, dtype):
        asked.append((device.device_kind, dtype))
        return {"converted": {1: 1.0, 64: 2.0}, "rounded": rounded}

    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v9", id=0)
    monkeypatch.setattr(product_choice, "_timed", timed)
    monkeypatch.setattr(product_choice, "_LARGE", 0)
    monkeypatch.setattr(product_choice, "_device", lambda model: device)
    for dtype, times in (("float32", 0), ("bfloat16", 1), ("bfloat16", 1)):
        # As in another process: the file alone remembers.
        monkeypatch.setattr(product_forms, "_measured", {})
        model = Matrices(weight)
        product_choice.prepare(model, dtype, tmp_path)
        assert asked == [("TPU v9", "bfloat16")] * times
        assert product_choice.rounds_rows(model) == (chosen and times == 1)
    assert model.matrix.get_value().values is weight.values
    assert len(list(tmp_path.iterdir())) == 1


def test_forms_are_timed_on_a_device(monkeypatch):
    """The timer itself; on a CPU both forms are one."""
    monkeypatch.setattr(product_choice, "_WIDTH", 64)
    monkeypatch.setattr(product_choice, "_PATIENCE", 0.0)
    monkeypatch.setattr(product_forms, "_measured", {})
    found = product_choice.measure_forms(jax.devices()[0], "bfloat16")
    assert set(found) == {"converted", "rounded"}
    for times in found.values():
        assert list(times) == [1] and times[1] > 0
