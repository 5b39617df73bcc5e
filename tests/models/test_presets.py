"""Presets against published parameter counts and published config.json files."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from treespec_jax.checkpoints.families import parameter_count
from treespec_jax.checkpoints.formats.huggingface_config import read_config
from treespec_jax.errors import UserError
from treespec_jax.models import presets, transformer

ROOT = pathlib.Path(__file__).parents[2]
# As the models' pages have them; Gemma 3 from 4b on is without its image tower.
PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
}
GEMMA2 = dict(
    architectures=["Gemma2ForCausalLM"],
    model_type="gemma2",
    attn_logit_softcapping=50.0,
    bos_token_id=2,
    eos_token_id=1,
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
LLAMA3 = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    attention_bias=False,
    bos_token_id=128000,
    eos_token_id=128001,
    hidden_act="silu",
    max_position_embeddings=131072,
    mlp_bias=False,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_theta=500000.0,
    vocab_size=128256,
)
SCALING = dict(
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
QWEN = dict(
    attention_dropout=0.0,
    bos_token_id=151643,
    hidden_act="silu",
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    use_sliding_window=False,
)
CONFIGS = {
    "llama-3.1-8b": dict(
        LLAMA3,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_hidden_layers=32,
        rope_scaling=dict(SCALING, factor=8.0),
        tie_word_embeddings=False,
    ),
    "llama-3.2-3b": dict(
        LLAMA3,
        head_dim=128,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_hidden_layers=28,
        rope_scaling=dict(SCALING, factor=32.0),
        tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        bos_token_id=0,
        eos_token_id=0,
        hidden_act="silu",
        hidden_size=576,
        intermediate_size=1536,
        is_llama_config=True,
        max_position_embeddings=8192,
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
        rms_norm_eps=1e-05,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "mistral-7b-v0.1": dict(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "qwen2.5-14b": dict(
        QWEN,
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        eos_token_id=151643,
        hidden_size=5120,
        intermediate_size=13824,
        max_position_embeddings=131072,
        max_window_layers=48,
        num_attention_heads=40,
        num_hidden_layers=48,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        sliding_window=131072,
        tie_word_embeddings=False,
        vocab_size=152064,
    ),
    "qwen3-4b": dict(
        QWEN,
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        attention_bias=False,
        eos_token_id=151645,
        head_dim=128,
        hidden_size=2560,
        intermediate_size=9728,
        max_position_embeddings=40960,
        max_window_layers=36,
        num_attention_heads=32,
        num_hidden_layers=36,
        num_key_value_heads=8,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "gemma-2b": dict(
        architectures=["GemmaForCausalLM"],
        model_type="gemma",
        attention_bias=False,
        bos_token_id=2,
        eos_token_id=1,
        head_dim=256,
        hidden_act="gelu",
        hidden_activation=None,
        hidden_size=2048,
        intermediate_size=16384,
        max_position_embeddings=8192,
        num_attention_heads=8,
        num_hidden_layers=18,
        num_key_value_heads=1,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=10000.0,
        vocab_size=256000,
    ),
    "gemma-2-9b": dict(
        GEMMA2,
        hidden_size=3584,
        intermediate_size=14336,
        num_attention_heads=16,
        num_hidden_layers=42,
        num_key_value_heads=8,
    ),
    "gemma-3-27b": dict(
        architectures=["Gemma3ForConditionalGeneration"],
        model_type="gemma3",
        eos_token_id=1,
        text_config=dict(
            head_dim=128,
            hidden_size=5376,
            intermediate_size=21504,
            model_type="gemma3_text",
            num_attention_heads=32,
            num_hidden_layers=62,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
            sliding_window=1024,
        ),
        vision_config=dict(hidden_size=1152),
    ),
}


def test_every_preset_has_its_published_parameters():
    counts = {name: parameter_count(presets.get(name)) for name in presets.names()}
    assert counts == PUBLISHED


def shallow(config, layers=2):
    local = tuple(i for i in config.local_layers if i < layers)
    return dataclasses.replace(config, num_layers=layers, local_layers=local)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_model_itself(name):
    """Of two layers, as the abstract model of a hundred takes seconds."""
    config = shallow(presets.get(name))
    assert transformer.parameter_count(config) == parameter_count(config)


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-2b", "gemma-3-270m"]
)
def test_counts_of_whole_models(name):
    assert transformer.parameter_count(presets.get(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_published_files_read_as_the_preset(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert read_config(tmp_path / "config.json") == presets.get(name)


def test_names():
    assert presets.get("Llama-3.1-8B") == presets.get("llama-3.1-8b")
    with pytest.raises(UserError, match="'llama3.1-8b'; did you mean 'llama-3.1-8b'"):
        presets.get("llama3.1-8b")
    with pytest.raises(UserError, match="no model is called '~'; .scripts/list_mod"):
        presets.get("~")


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "list_models.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_list():
    done = run()
    assert done.returncode == 0, done.stderr
    sizes, _, catalogue = done.stdout.partition("\n\n")
    lines = sizes.splitlines()
    assert len(lines) == len(PUBLISHED) + 2
    assert "tinystories-5m" in catalogue and "smollm2-135m-instruct" in catalogue
    assert lines[0].split()[:3] == ["name", "family", "parameters"]
    row = next(line.split() for line in lines if line.startswith("llama-3-8b"))
    assert row[1:] == ["llama", "8,030,261,248", "16.06", "131.1", "8,192"]


def test_list_of_names_and_folders_in_json():
    folder = str(ROOT / "tests" / "golden" / "qwen2")
    done = run(f"--model=qwen3-0.6b,{folder}", "--dtype=float32", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["dtype"] == "float32"
    first, second = values["models"]
    assert first == {
        "name": "qwen3-0.6b",
        "family": "qwen3",
        "parameters": 596_049_920,
        "weight_bytes": 4 * 596_049_920,
        "cache_bytes_per_token": 28 * 2 * 8 * 128 * 4,
        "positions": 40960,
    }
    assert (second["name"], second["family"]) == (folder, "qwen2")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model=llama-3.1-8", "did you mean 'llama-3.1-8b'?"),
        ("--model=tests", "tests holds no checkpoint"),
        ("--dtype=int8", "one of <float32|bfloat16|float16>"),
        ("--jsno", "Unknown command line flag 'jsno'"),
    ],
)
def test_mistakes(flag, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = run(flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_norms_of_qwen():
    """The chat models from 14B on have 1e-6; the presets are the base models."""
    sizes = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
    found = {size: presets.get(f"qwen2.5-{size}").norm_eps for size in sizes}
    small = dict.fromkeys(("0.5b", "1.5b", "3b", "7b"), 1e-6)
    assert found == {**small, **dict.fromkeys(("14b", "32b", "72b"), 1e-5)}
