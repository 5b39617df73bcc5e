"""Factors per channel for int8: they change no function, and rounding loses less."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from tests.oracles import full_logits
from treespec_jax.checkpoints import conversion, describe, int8_scales, load
from treespec_jax.checkpoints.placement import Parameters, parameters_of
from treespec_jax.errors import UserError
from treespec_jax.tuning import int8_scales as tuning

GOLDEN = "tests/golden"
# Unit offsets, norms behind, windows and two rotary angles; biases; neither.
FAMILIES = ["gemma3_text", "qwen2", "llama_grouped"]
TEXT = np.arange(3, 43, dtype=np.int32)


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return shutil.copytree(f"{GOLDEN}/{request.param}", tmp_path / "model")


def random_scales(config, spread=16):
    rng = np.random.default_rng(0)
    widths = config.embed_dim, config.embed_dim, config.mlp_dim
    shapes = ((config.num_layers, width) for width in widths)
    parts = (rng.integers(-spread, spread + 1, shape) for shape in shapes)
    return int8_scales.Int8Scales(*(part.astype(np.int8) for part in parts))


def test_any_factors_leave_the_function_as_it_is(folder):
    """Of weights that are not rounded; a part of a parameter is that part of it."""
    about = describe(folder)
    plain = load(about, "float32")
    wanted = full_logits(plain.model, TEXT.tolist())
    scales = random_scales(plain.config)
    parameters = Parameters(about, "float32")
    parameters.scales = scales
    folded = parameters.build()
    found = full_logits(folded, TEXT.tolist())
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    changed = set()
    for path, leaf in parameters_of(folded).items():
        before = np.asarray(parameters_of(plain.model)[path][...])
        if not np.array_equal(np.asarray(leaf[...]), before):
            changed.add(path.split(".", 2)[-1])
        box = tuple((size // 3, size - size // 4) for size in leaf.shape)
        part = parameters.read(path, box)
        whole = np.asarray(leaf[...])[tuple(slice(*span) for span in box)]
        np.testing.assert_array_equal(part, whole)
    assert changed == {
        *("attention_norm.scale", "attention.qkv", "mlp_norm.scale"),
        *("mlp.gate_up", "mlp.down"),
    }


def test_largest_activations_are_those_of_the_pass(folder):
    """Each is what its product reads: it changes with what makes that."""
    loaded = load(folder, "float32")
    before = tuning.largest_activations(loaded.model, [TEXT])
    offset = 1.0 if loaded.config.unit_offset_norms else 0.0
    last = loaded.model.layers[-1]
    gate_up = last.mlp.gate_up[...]
    last.mlp.gate_up[...] = gate_up.at[1].multiply(3)
    after = tuning.largest_activations(loaded.model, [TEXT[:20], TEXT])
    np.testing.assert_allclose(after["down"][-1], 3 * before["down"][-1], rtol=1e-4)
    for name in ("attention", "mlp"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-6)
    last.mlp_norm.scale[...] = 2 * (last.mlp_norm.scale[...] + offset) - offset
    after = tuning.largest_activations(loaded.model, [TEXT])
    np.testing.assert_allclose(after["mlp"][-1], 2 * before["mlp"][-1], rtol=1e-4)
    last.attention_norm.scale[...] = 0 * last.attention_norm.scale[...] - offset
    after = tuning.largest_activations(loaded.model, [TEXT])
    assert not after["attention"][-1].any() and after["attention"][-2].any()
    shapes = {name: found.shape for name, found in before.items()}
    assert shapes["down"] == (loaded.config.num_layers, loaded.config.mlp_dim)
    assert all((found > 0).mean() > 0.9 for found in before.values())


def outliers(folder):
    """A model some of whose channels are many times as large as the others."""
    loaded = load(folder, "float32")
    rng = np.random.default_rng(1)
    for layer in loaded.model.layers:
        for norm, matrix in (
            (layer.attention_norm, layer.attention.qkv),
            (layer.mlp_norm, layer.mlp.gate_up),
        ):
            large = np.where(rng.random(norm.scale.shape) < 0.1, 40.0, 1.0)
            norm.scale[...] = norm.scale[...] * large
            matrix[...] = matrix[...] / large
    return loaded


def test_rounding_loses_less(tmp_path):
    """Read from the file beside the weights, by `load` and by `convert` alike."""
    from treespec_jax.checkpoints import save

    loaded = outliers(f"{GOLDEN}/llama_grouped")
    save(loaded, tmp_path / "model")
    wanted = full_logits(loaded.model, TEXT.tolist())

    def error(path):
        rounded = load(path, "float32", weights="int8").model
        return np.abs(full_logits(rounded, TEXT.tolist()) - wanted).mean()

    before = error(tmp_path / "model")
    scales = tuning.find(loaded, [TEXT])
    file = int8_scales.file_of(tmp_path / "model")
    int8_scales.write(file, scales, {"text": "x"})
    after = error(tmp_path / "model")
    assert after < 0.5 * before
    about = describe(tmp_path / "model")
    conversion.convert(about, tmp_path / "int8", "float32", "int8")
    assert error(tmp_path / "int8") == after
    # Which has had them: none are folded in twice.
    shutil.copy(file, tmp_path / "int8")
    assert error(tmp_path / "int8") == after
    same = load(tmp_path / "model", "float32").model
    np.testing.assert_array_equal(full_logits(same, TEXT.tolist()), wanted)


def test_a_file_of_another_model_is_refused(tmp_path):
    folder = shutil.copytree(f"{GOLDEN}/llama_grouped", tmp_path / "model")
    config = describe(folder).config
    file = int8_scales.file_of(folder)
    other = dataclasses.replace(config, mlp_dim=config.mlp_dim + 1)
    int8_scales.write(file, random_scales(other), {})
    with pytest.raises(UserError, match="of another model: down has shape"):
        load(folder, weights="int8")
    load(folder, weights="float32")
    for data in (b"x", file.read_bytes()[:-30]):
        file.write_bytes(data)
        with pytest.raises(UserError, match="does not hold factors for int8"):
            load(folder, weights="int8")


def test_the_package_has_those_of_smollm2():
    from treespec_jax.checkpoints.catalogue import CATALOGUE
    from treespec_jax.models import presets

    known = [model for model in CATALOGUE.values() if model.int8_scales]
    assert [model.name for model in known] == ["smollm2-135m-instruct"]
    for model in known:
        found = int8_scales.read(model.path, presets.get("smollm2-135m"))
        assert found is not None and np.abs(found.attention).max() > 8
