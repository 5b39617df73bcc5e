"""Folders that hold no whole model in plain numbers: the reason in one line."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treespec_jax.checkpoints import describe
from treespec_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHT = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "llama_grouped", tmp_path / "model"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder) -> str:
    """What is said of the folder, by its small files or by the names of its tensors."""
    with pytest.raises(UserError) as caught:
        describe(folder).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, " (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, " (bitsandbytes)"),
        ({"quantization_config": True}, ""),
        ({"compression_config": {"format": "int"}}, " (compressed-tensors)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, " (MLX)"),
    ],
)
def test_settings_of_quantisers(folder, settings, method):
    change_config(folder, **settings)
    (key,) = settings
    said = refusal(folder)
    assert f"{key} says that the weights are quantised{method}, which is not" in said
    assert said.endswith("float16, or a GGUF file")


def test_settings_around_those_of_the_text_part(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(GOLDEN / "gemma3_multimodal", path)
    change_config(path, quantization_config={"bits": 4})
    assert "quantization_config says that the weights are quantised," in refusal(path)


@pytest.mark.parametrize(
    ("file", "method"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")]
)
def test_files_of_quantisers(folder, file, method):
    (folder / file).write_text('{"bits": 4}')
    assert f"{file} says that the weights are quantised ({method})" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"{WEIGHT}.qweight", f"{WEIGHT}.scales"], "quantised (GPTQ or AWQ)"),
        ([f"{WEIGHT}.weight_packed"], "quantised (compressed-tensors)"),
        ([f"{WEIGHT}.weight.absmax"], "quantised (bitsandbytes)"),
        (
            [f"{WEIGHT}.weight.quant_state.bitsandbytes__nf4"],
            "quantised (bitsandbytes)",
        ),
        ([f"{WEIGHT}.weight_scale_inv"], "quantised (FP8 or INT8)"),
        ([f"{WEIGHT}.scales", f"{WEIGHT}.biases"], "quantised (MLX)"),
        (["base_model.x.q_proj.lora_A.weight"], "a LoRA adapter, not a model; merge"),
        (["fc.weight"], "a drafter of method 'eagle', which cannot speak without"),
        (["0.0.linear.weight"], "Medusa heads, which cannot speak without its target"),
    ],
)
def test_names_of_tensors(folder, names, expected):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: np.ones(4, np.uint8) for name in names}
    save_file(tensors, folder / "model.safetensors")
    assert expected in refusal(folder)


@pytest.mark.parametrize("config", [True, False])
def test_adapters(folder, config):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    about = {"base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    if not config:
        (folder / "config.json").unlink()
    assert "holds a LoRA adapter, not a model; merge it into its base model " in (
        refusal(folder)
    )
    assert "(org/base) first" in refusal(folder)


def test_an_adapter_that_was_merged_is_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    describe(folder).open()


def test_heads_without_weights(folder):
    for file in folder.iterdir():
        file.unlink()
    about = {"medusa_num_heads": 5, "base_model_name_or_path": "org/base"}
    (folder / "config.json").write_text(json.dumps(about))
    assert "holds Medusa heads, which cannot speak without its target" in refusal(
        folder
    )


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_missing(folder, key):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    assert f"config.json lacks {key}, which models of family llama need" in (
        refusal(folder)
    )


def test_a_pointer_of_git_lfs(folder):
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "config.json is a Git LFS pointer, not the file itself" in refusal(folder)


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "medusa_lm_head.pt"])
def test_pointers_instead_of_one_file(tmp_path, name):
    line = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 9\n"
    (tmp_path / name).write_text(line)
    with pytest.raises(UserError, match="LFS pointer|drafter of method 'medusa'"):
        describe(tmp_path / name)


@pytest.mark.parametrize(
    ("older", "newer", "want"),
    [
        (
            {"type": "linear", "factor": 2.0},
            {"rope_type": "default", "rope_theta": 1e6},
            ("linear", 2.0, 1e6),
        ),
        (
            {"rope_type": "linear", "factor": 2.0},
            {"rope_theta": 1e6},
            ("linear", 2.0, 1e6),
        ),
        (
            {"rope_theta": 1e6},
            {"rope_type": "linear", "factor": 4.0},
            ("linear", 4.0, 1e6),
        ),
        (
            {"type": "linear", "factor": 2.0, "rope_theta": 1e6},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            ("linear", 2.0, 1e6),
        ),
        ({}, {"rope_theta": 1e6}, ("none", 1.0, 1e6)),
        (None, {"rope_theta": 1e6}, ("none", 1.0, 1e6)),
    ],
)
def test_scaling_beside_rotary_parameters(folder, older, newer, want):
    change_config(folder, rope_scaling=older, rope_parameters=newer, rope_theta=None)
    rotary = describe(folder).config.rotary
    assert (rotary.scaling, rotary.factor, rotary.theta) == want


@pytest.mark.parametrize(
    ("older", "newer", "message"),
    [
        (
            {"type": "linear", "factor": 2.0},
            {"rope_type": "linear", "factor": 4.0},
            "rope_scaling.factor=2.0, but rope_parameters has 4.0; remove one of them",
        ),
        (
            {"type": "linear", "factor": 2.0},
            {"rope_type": "llama3"},
            'rope_scaling.rope_type="linear", but rope_parameters has "llama3"',
        ),
        ([2], {"rope_theta": 1e6}, "rope_scaling=[2] is not supported"),
        ({"factor": 2.0}, 3, "rope_parameters=3 is not supported"),
    ],
)
def test_scaling_that_contradicts_rotary_parameters(folder, older, newer, message):
    change_config(folder, rope_scaling=older, rope_parameters=newer)
    assert message in refusal(folder)


def test_scaling_beside_rotary_parameters_by_layer(tmp_path):
    path = pathlib.Path(shutil.copytree(GOLDEN / "gemma3_text", tmp_path / "model"))
    both = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    scaling = {"rope_type": "linear", "factor": 8.0}
    change_config(path, rope_scaling=scaling, rope_parameters=both)
    config = describe(path).config
    assert (config.rotary.theta, config.rotary.factor) == (5e5, 8.0)
    assert config.local_rotary.theta == 2e4 and config.local_rotary.factor == 1
