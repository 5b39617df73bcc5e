"""Checkpoints in other weight types than their own."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.support import same_parameters
from treespec_jax.checkpoints import conversion, describe, load, save, widening
from treespec_jax.checkpoints.loading import check_floats
from treespec_jax.checkpoints.placement import Parameters, parameters_of
from treespec_jax.errors import UserError
from treespec_jax.models.quantized import Quantized, quantize
from treespec_jax.sharding import make_mesh

GOLDEN = "tests/golden/llama_grouped"
KINDS = ["int8", "int8:16", "bfloat16"]


@pytest.fixture(scope="module")
def floats():
    return load(GOLDEN, "float32")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request):
    return load(GOLDEN, "float32", weights=request.param)


def test_matrices_are_rounded_and_vectors_are_not(loaded, floats):
    kinds = set()
    for path, leaf in parameters_of(loaded.model).items():
        found, full = leaf[...], np.asarray(parameters_of(floats.model)[path][...])
        if full.ndim == 1:
            np.testing.assert_array_equal(found, full)
            continue
        kinds.add(type(found))
        if isinstance(found, Quantized):
            inputs = full.ndim - found.out_rank
            want = quantize(full, inputs, found.scales.shape[0])
            np.testing.assert_array_equal(found.values, want.values)
            np.testing.assert_array_equal(found.scales, want.scales)
        else:
            np.testing.assert_array_equal(found, full.astype(found.dtype))
    assert loaded.dtype == "float32" and len(kinds) == 1
    assert (kinds == {Quantized}) == loaded.weights.startswith("int8")


def test_blocks_of_any_size_give_the_same(loaded, monkeypatch):
    monkeypatch.setattr("treespec_jax.checkpoints.placement._PART", 600)
    small = Parameters(describe(GOLDEN), "float32", weights=loaded.weights).build()
    assert same_parameters(small, loaded.model)


def test_saved_and_loaded_again(loaded, tmp_path):
    """By `save` and by `convert` alike; int8 is read as int8 unless asked otherwise."""
    save(loaded, tmp_path / "saved")
    conversion.convert(
        describe(GOLDEN), tmp_path / "converted", "float32", loaded.weights
    )
    for name in ("saved", "converted"):
        again = load(tmp_path / name, "float32", weights=None)
        if loaded.weights == "bfloat16":
            again = load(tmp_path / name, "float32", weights="bfloat16")
        assert again.weights == loaded.weights
        assert same_parameters(again.model, loaded.model)
    plain = load(tmp_path / "saved", "float32", weights="float32")
    assert plain.weights == "float32"
    x = np.random.default_rng(0).normal(size=(plain.config.embed_dim, 2))
    x = x.astype(np.float32)
    found, want = (m.model.logit_columns(x) for m in (loaded, plain))
    np.testing.assert_allclose(found, want, atol=0.03 * np.abs(want).max())


def test_a_mesh_holds_the_same(loaded):
    """Of one device here; the parts of several are those of unrounded weights."""
    found = load(GOLDEN, "float32", weights=loaded.weights, mesh=make_mesh("tensor:1"))
    ours, theirs = (
        jax.tree.leaves(nnx.state(m.model, nnx.Param)) for m in (loaded, found)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_integers_are_not_changed(loaded):
    """What needs every number says so; floats of any type can be widened."""
    if loaded.weights == "bfloat16":
        check_floats(loaded)
        return
    with pytest.raises(UserError, match="weights are int8.* not trained or changed"):
        widening.widen(loaded, loaded.config)
