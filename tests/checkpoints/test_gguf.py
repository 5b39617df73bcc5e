"""GGUF files: against the same weights in Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import gguf_files
from tests.checkpoints.contract import FormatContract, refusal
from tests.checkpoints.support import (
    SMALL,
    forward,
    same_parameters,
    tensors_of,
    train_sentencepiece,
)
from treespec_jax.checkpoints import describe, load, load_tokenizer
from treespec_jax.checkpoints.families import name_table
from treespec_jax.checkpoints.formats.gguf import GgufFormat
from treespec_jax.checkpoints.formats.gguf_config import read_config
from treespec_jax.checkpoints.formats.huggingface_config import (
    read_config as read_huggingface,
)
from treespec_jax.checkpoints.gguf_source import GgufSource, Header, StoredTensor
from treespec_jax.config import RotaryConfig
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
# By architecture: the golden folder whose settings its file has.
ARCHITECTURES = {
    "llama": "llama_grouped",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# Rows of 256, which K types need.
SIZES = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    query_pre_attn_scalar=16,
    sliding_window_pattern=2,
    layer_types=None,
    eos_token_id=1,
)


def write_pair(folder: Path, architecture: str, kinds, layers: int = 2):
    """A GGUF file with all of `kinds`, and a folder with what it holds in float32."""
    values = json.loads(
        (GOLDEN / ARCHITECTURES[architecture] / "config.json").read_text()
    )
    values |= {**SIZES, "num_hidden_layers": layers}
    theirs = folder / "huggingface"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(values))
    config = read_huggingface(theirs / "config.json")
    rng = np.random.default_rng(0)
    tensors = {}
    for piece in name_table(config, ()).pieces:
        scale = 0.05 if len(piece.shape) > 1 else 0.3
        tensors[piece.name] = rng.normal(0, scale, piece.shape).astype(np.float32)
        if piece.name.endswith("norm.weight") and not config.unit_offset_norms:
            tensors[piece.name] += np.float32(1)
    raw, expected = gguf_files.convert(config, tensors, kinds)
    save_file(expected, theirs / "model.safetensors")
    metadata = gguf_files.metadata_of(config)
    return gguf_files.write(folder / "model.gguf", metadata, raw), theirs


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_pair(folder, request.param, gguf_files.KINDS)


class TestContract(FormatContract):
    format = GgufFormat
    keeps_tokenizer_file = False

    @pytest.fixture(scope="class")
    def tokenizer(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("vocabulary")
        path = train_sentencepiece(folder, vocab_size=SMALL.vocab_size)
        return load_tokenizer(path)

    @pytest.fixture
    def checkpoint(self, tmp_path, model, tokenizer):
        tensors = tensors_of(model, name_table(SMALL, ()).pieces)
        raw, _ = gguf_files.convert(SMALL, tensors)
        metadata = gguf_files.metadata_of(SMALL)
        metadata |= gguf_files.sentencepiece_vocabulary(tokenizer._model)
        path = tmp_path / "folder" / "model.gguf"
        path.parent.mkdir()
        return gguf_files.write(path, metadata, raw)

    def test_a_name_without_its_ending(self, checkpoint):
        """As in the stores of programs that name files by their contents."""
        path = checkpoint.rename(checkpoint.with_name("sha256-1234"))
        assert describe(path).config.num_layers == SMALL.num_layers


def test_configuration_is_that_of_the_folder(pair):
    found, wanted = (describe(path).config for path in pair)
    assert found == wanted
    assert found.family == wanted.family


@pytest.fixture(scope="module")
def models(pair):
    """The file and the folder, loaded."""
    return [load(path, "float32") for path in pair]


def test_parameters_equal_those_of_the_folder(pair, models):
    """Bit by bit, of every type."""
    stored = {t.tensor_type.name for t in gguf.GGUFReader(pair[0]).tensors}
    assert stored == {*gguf_files.KINDS}
    assert same_parameters(*(loaded.model for loaded in models))


@pytest.mark.slow
def test_logits_equal_those_of_the_folder(models):
    size = models[0].config.vocab_size
    tokens = np.random.default_rng(1).integers(3, size, (1, 24))
    found, wanted = (np.asarray(forward(m.model, tokens)[0]) for m in models)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", gguf_files.KINDS)
def test_every_type_in_every_place(kind, tmp_path):
    """The rows of queries and keys, put back, too."""
    file, folder = write_pair(tmp_path, "llama", (kind,), layers=1)
    found, wanted = load(file, "float32"), load(folder, "float32")
    assert same_parameters(found.model, wanted.model)
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert describe(file).dtype == GgufSource(file).dtype == stored


def test_parts_of_quantised_tensors(pair):
    """Rows and columns that begin and end within blocks."""
    file, _ = pair
    source = GgufSource(file)
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    assert tensors.keys() == source.shapes().keys()
    for name, shape in source.shapes().items():
        tensor = tensors[name]
        whole = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        for part in (1, 3):
            region = tuple(slice(size // 5, size // 5 + part) for size in shape)
            np.testing.assert_array_equal(source.read(name, region), whole[region])
        found = source.read(name, tuple(slice(0, size) for size in shape))
        np.testing.assert_array_equal(found, whole)


@pytest.mark.slow
def test_llama3_frequencies_are_a_tensor(tmp_path):
    """Against transformers' logits, past the length before stretching."""
    config = read_huggingface(GOLDEN / "llama3" / "config.json")
    tensors = load_file(GOLDEN / "llama3" / "model.safetensors")
    tensors = {name: t.astype(np.float32) for name, t in tensors.items()}
    raw, _ = gguf_files.convert(config, tensors)
    assert 1 < raw["rope_freqs.weight"][1].max() == config.rotary.factor
    metadata = gguf_files.metadata_of(config)
    loaded = load(gguf_files.write(tmp_path / "m.gguf", metadata, raw), "float32")
    assert loaded.config.rotary.scaling == "factors"
    with np.load(GOLDEN / "llama3" / "golden.npz") as golden:
        found, _ = forward(loaded.model, golden["tokens"])
        np.testing.assert_allclose(found, golden["logits"], atol=1e-4)


def read(changes=(), architecture="llama", tensors=("output.weight",)):
    """The configuration of a file whose metadata are changed."""
    shapes = {"token_embd.weight": (96, 32), **{name: (96, 32) for name in tensors}}
    stored = {name: StoredTensor(shape, "F32", 0) for name, shape in shapes.items()}
    values = {
        "block_count": 12,
        "context_length": 512,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    }
    metadata = {f"{architecture}.{key}": value for key, value in values.items()}
    metadata |= {"general.architecture": architecture}
    for key, value in dict(changes).items():
        whole = key.startswith(("general.", "tokenizer."))
        metadata[key if whole else f"{architecture}.{key}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return read_config(Header(Path("some/model.gguf"), metadata, stored))


def test_what_files_leave_out():
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 8, 96)
    assert config.rotary == RotaryConfig(1e4) and config.norm_eps == 1e-6
    assert (config.bos_id, config.eos_ids, config.window) == (None, (), None)
    assert not config.tied_embeddings and read(tensors=()).tied_embeddings
    gemma2 = read(architecture="gemma2")
    assert (gemma2.window, gemma2.local_layers) == (4096, (0, 2, 4, 6, 8, 10))
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (50.0, 30.0)
    gemma3 = read({"attention.sliding_window": 128}, "gemma3")
    assert gemma3.local_layers == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)
    assert gemma3.rotary == RotaryConfig(1e6)
    assert gemma3.local_rotary == RotaryConfig(1e4)
    assert read(architecture="gemma3").window is None


def test_attention_of_the_largest_gemmas_is_scaled_by_width():
    """llama.cpp knows them by their layers."""
    for architecture, layers in (("gemma2", 46), ("gemma3", 62)):
        changes = {"attention.key_length": 16, "block_count": layers}
        changes["attention.value_length"] = changes["rope.dimension_count"] = 16
        assert read(changes, architecture).attention_scale == 8**-0.5
        changes["block_count"] = 26
        assert read(changes, architecture).attention_scale is None


def test_ends_and_lists():
    ends = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    assert read(ends).eos_ids == (7, 9)
    per_layer = {"attention.head_count_kv": [2] * 12, "feed_forward_length": [40] * 12}
    config = read(per_layer)
    assert (config.num_kv_heads, config.mlp_dim) == (2, 40)
    window = {"attention.sliding_window": 8}
    pattern = {**window, "attention.sliding_window_pattern": [True, False] * 6}
    assert read(pattern, "gemma2").local_layers == (0, 2, 4, 6, 8, 10)
    pattern["attention.sliding_window_pattern"] = 4
    assert read(pattern, "gemma3").local_layers == (0, 1, 2, 4, 5, 6, 8, 9, 10)
    # Longer than any text: it limits nothing.
    assert read({"attention.sliding_window": 512}).window is None


@pytest.mark.parametrize(
    ("changes", "rotary"),
    [
        ({"rope.freq_base": 5e5}, RotaryConfig(5e5)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RotaryConfig()),
        ({"rope.scaling.type": "linear"}, RotaryConfig()),
        ({"rope.scaling.factor": 4.0}, RotaryConfig(1e4, "linear", 4.0)),
        ({"rope.scale_linear": 2.0}, RotaryConfig(1e4, "linear", 2.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            RotaryConfig(1e4, "yarn", 4.0, 512),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 256,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 0.5,
            },
            RotaryConfig(
                1e4,
                "yarn",
                4.0,
                256,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=0.5 * (0.1 * np.log(4.0) + 1),
            ),
        ),
    ],
)
def test_rotary_scaling(changes, rotary):
    config = read(changes)
    assert config.rotary == rotary
    original = rotary.original_max_positions
    assert config.max_positions == (4 * original if original else 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "phi3"}, "general.architecture='phi3' is not supp"),
        ({"general.architecture": None}, "lacks general.architecture"),
        (
            {"general.type": "adapter"},
            "general.type='adapter' is not supported, only m",
        ),
        ({"block_count": None}, "lacks llama.block_count; download it again"),
        ({"context_length": None}, "lacks llama.context_length"),
        (
            {"attention.layer_norm_rms_epsilon": None},
            "lacks llama.attention.layer_norm",
        ),
        ({"expert_count": 8}, "llama.expert_count=8 is not supported, only 0"),
        ({"attention.causal": False}, "llama.attention.causal=False is not supported"),
        ({"logit_scale": 0.5}, "llama.logit_scale=0.5 is not supported"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count=4 is not supported"),
        ({"attention.value_length": 4}, "llama.attention.value_length=4 is not supp"),
        ({"attention.sliding_window": 64}, "sliding_window=64 is not supported, only"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supp"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5 is not supported"),
        ({"attention.head_count_kv": [2, 4]}, "head_count_kv=[2, 4] must be a whole"),
        ({"attention.head_count_kv": 3}, "num_heads=4 is not a multiple of"),
        ({"block_count": "2"}, "llama.block_count='2' must be a whole number"),
        ({"rope.freq_base": "x"}, "llama.rope.freq_base='x' must be a number"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id=-1 must be a token's id"),
    ],
)
def test_metadata_that_are_not_supported(changes, message):
    error = str(refusal(read, changes))
    assert error.startswith("some/model.gguf") and "\n" not in error
    assert message in error


@pytest.fixture
def small(tmp_path):
    """Writes a file of one layer with a type for its embedding."""
    config = dataclasses.replace(
        SMALL, embed_dim=256, num_layers=1, num_kv_heads=4, tied_embeddings=True
    )
    shapes = {piece.name: piece.shape for piece in name_table(config, ()).pieces}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    raw, _ = gguf_files.convert(config, tensors)

    def write(embedding=None, changes=(), **options):
        if embedding is not None:
            raw["token_embd.weight"] = embedding
        metadata = {**gguf_files.metadata_of(config), **dict(changes)}
        return gguf_files.write(tmp_path / "small.gguf", metadata, raw, **options)

    return write


def one_line(path, function=load) -> str:
    message = str(refusal(function, path))
    assert str(path) in message and "\n" not in message
    return message


def test_files_of_other_kinds(tmp_path, small):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGML" + bytes(40))
    assert "is no GGUF file: it begins with b'GGML'" in one_line(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git LFS pointer" in one_line(path)
    data = bytearray(small().read_bytes())
    for version in (1, 4):
        data[4:8] = struct.pack("<I", version)
        path.write_bytes(data)
        assert f"is a GGUF file of version {version}, only 2 and 3" in one_line(path)
    big = small(endianess=gguf.GGUFEndian.BIG)
    assert "is a big-endian GGUF file" in one_line(big)


def test_types_that_are_not_known(small):
    blocks = np.zeros((300, 292), np.uint8)
    path = small(("Q8_K", blocks))
    for function in (describe, load):
        message = one_line(path, function)
        assert "tensor token_embd.weight is of type Q8_K" in message
    data = path.read_bytes()
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at) == (gguf.GGMLQuantizationType.Q8_K,)
    path.write_bytes(data[:at] + struct.pack("<I", 999) + data[at + 4 :])
    message = one_line(path)
    assert "999" in message and "does not know this tensor type" in message
    whole = small(("I32", np.zeros((300, 256), np.int32)))
    assert "is of type I32" in one_line(whole)


def test_parts_and_tensors_that_do_not_fit(small, tmp_path):
    path = small(changes={"split.count": 3, "split.no": 1})
    assert "is part 2 of 3 of a model; join the parts" in one_line(path)
    path = small(changes={"llama.feed_forward_length": 48})
    assert "tensor blk.0.ffn_gate.weight has shape [24, 256], the" in one_line(path)
    path = small(changes={"llama.block_count": 2})
    assert "tensor blk.1.attn_norm.weight is missing" in one_line(path)
    path = small(changes={"general.architecture": "qwen3"})
    assert "lacks qwen3." in one_line(path)


def test_values_that_are_not_finite(small):
    broken = np.ones((300, 256), np.float32)
    broken[7, 3] = np.nan
    message = one_line(small(("F32", broken)))
    assert "tensor token_embd.weight holds NaN" in message


def test_without_a_tokenizer(small, tmp_path):
    path = small(changes={"tokenizer.ggml.model": "none"})
    assert describe(path).tokenizer is None
    with pytest.raises(UserError, match="lacks tokenizer.ggml.tokens"):
        describe(small(changes={"tokenizer.ggml.model": "gpt2"}))
