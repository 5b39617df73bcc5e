"""Hugging Face folders: layouts of their files, and messages about damaged ones."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.contract import FormatContract
from tests.checkpoints.support import (
    SMALL,
    same_parameters,
    tensors_of,
    train_sentencepiece,
    write_huggingface,
)
from treespec_jax.checkpoints import load
from treespec_jax.checkpoints.families import FAMILIES, name_table
from treespec_jax.checkpoints.formats.huggingface import HuggingFaceFormat
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
QUERY = "model.layers.1.self_attn.q_proj.weight"


class TestContract(FormatContract):
    format = HuggingFaceFormat

    @pytest.fixture
    def checkpoint(self, tmp_path, model, tokenizer):
        tensors = tensors_of(model, name_table(SMALL, ()).pieces)
        folder = write_huggingface(tmp_path / "model", SMALL, tensors)
        tokenizer.save(folder)
        return folder


@pytest.fixture
def folder(tmp_path):
    """A copy of a good folder, to break."""
    return pathlib.Path(shutil.copytree(GOLDEN / "llama_grouped", tmp_path / "model"))


@pytest.fixture(scope="module")
def good():
    return load(GOLDEN / "llama_grouped")


def change_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "DELETE"}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Splits the only file into two and an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in parts.items() for name in held}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    return list(parts)


def test_source_and_dtype(good):
    assert (good.source, good.dtype) == ("llama_grouped", np.float32)
    assert good.tokenizer is None


def test_shards(folder, good):
    shard(folder)
    assert same_parameters(load(folder).model, good.model)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_files(folder, name):
    dtype = np.dtype(name)
    full = load_file(folder / "model.safetensors")
    change_tensors(
        folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()})
    )
    half, single = load(folder), load(folder, "float32")
    assert (half.dtype.name, single.dtype.name) == (name, "float32")
    found = np.asarray(single.model.embedding[...])
    expected = full["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert half.model.embedding[...].dtype == dtype


def test_casting_is_that_of_the_tensors(good):
    found = load(GOLDEN / "llama_grouped", "bfloat16").model.embedding[...]
    expected = np.asarray(good.model.embedding[...]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_useless_tensors_of_old_files(folder):
    angles = np.ones(8, np.float32)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({name: angles}))
    load(folder)


def test_tied_folder_with_a_spare_head(tmp_path):
    folder = pathlib.Path(shutil.copytree(GOLDEN / "llama_tied", tmp_path / "tied"))

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change_tensors(folder, add)
    load(folder)


def test_tokenizer_of_the_folder(folder, tmp_path):
    change_config(folder, vocab_size=330)

    def grow(tensors):
        for name in ["model.embed_tokens.weight", "lm_head.weight"]:
            tensors[name] = np.zeros((330, 64), np.float32)

    change_tensors(folder, grow)
    made = train_sentencepiece(tmp_path)
    shutil.copy(made, folder / "tokenizer.model")
    loaded = load(folder)
    assert loaded.tokenizer.source == str(folder / "tokenizer.model")
    assert loaded.tokenizer.eos_ids == loaded.config.eos_ids == (2,)
    assert loaded.config.bos_id == 1
    other = train_sentencepiece(tmp_path, "other", bos_id=-1, eos_id=1, vocab_size=310)
    chosen = load(folder, tokenizer=other)
    assert chosen.tokenizer.source == str(other)
    assert chosen.config.bos_id is None
    assert chosen.config.eos_ids == (2, 1)


@pytest.mark.parametrize("value", [0, "64", 6.5, True])
def test_sizes_that_are_no_sizes(folder, value):
    change_config(folder, hidden_size=value)
    with pytest.raises(UserError, match="hidden_size=.* must be a whole number"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_damaged_configuration(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json (is not JSON|must hold a JSON)"):
        load(folder)


def test_missing_tensor(folder):
    change_tensors(folder, lambda t: t.pop(QUERY))
    with pytest.raises(UserError, match=f"tensor {QUERY} is missing"):
        load(folder)


def test_wrong_shape(folder):
    change_tensors(folder, lambda t: t.update({QUERY: np.ones((64, 32), np.float32)}))
    with pytest.raises(UserError, match=rf"{QUERY} has shape \[64, 32\].*\[64, 64\]"):
        load(folder)


def test_unread_tensor(folder):
    extra = {f"model.layers.{i}.q_norm": np.ones(4, np.float32) for i in (2, 3)}
    change_tensors(folder, lambda t: t.update(extra))
    with pytest.raises(UserError, match="layers.2.q_norm and 1 more would stay unread"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        (
            "llama_grouped",
            "qwen2",
            "tensor model.layers.0.self_attn.q_proj.bias is missing, which models of "
            "family qwen2 have",
        ),
        (
            "qwen2",
            "llama",
            "model.layers.0.self_attn.k_proj.bias and 5 more would stay unread; "
            "family llama, which the configuration names, has no such tensor",
        ),
        ("qwen3", "llama", "self_attn.k_norm.weight and 3 more would stay unread"),
        ("gemma2", "gemma", "post_feedforward_layernorm.weight and 5 more would"),
        ("gemma3_text", "gemma2", "self_attn.k_norm.weight and 7 more would"),
        ("gemma", "llama", "embed_tokens.weight has shape"),
    ],
)
def test_wrong_family_is_found_before_memory_is_spent(
    name, family, message, tmp_path, monkeypatch
):
    folder = pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    row = FAMILIES[family]
    named = dict(architectures=row.architectures[:1], model_type=row.model_types[0])
    # As if the configuration of another download had been copied over it.
    if family == "llama":
        named["hidden_act"] = "silu"
    if name == "gemma":
        named["hidden_size"] = 64
    change_config(folder, **named)

    def read(*_):
        pytest.fail("a tensor was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite(folder, bad, dtype):
    def spoil(tensors):
        tensors[QUERY] = tensors[QUERY].astype(dtype)
        tensors[QUERY][-1, -1] = bad

    change_tensors(folder, spoil)
    with pytest.raises(UserError, match=f"tensor {QUERY} holds NaN or infinity"):
        load(folder)


def test_quantised_tensor(folder):
    change_tensors(folder, lambda t: t.update({QUERY: np.ones((64, 64), np.int8)}))
    with pytest.raises(UserError, match=f"{QUERY} is int8; quantised"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_file_cut_short(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no .*safetensors file"):
        load(folder)


def test_missing_shard(folder):
    first, _ = shard(folder)
    (folder / first).unlink()
    with pytest.raises(UserError, match=f"{first} is missing, model.safetensors.index"):
        load(folder)


def test_damaged_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="lacks a weight_map"):
        load(folder)


def change_header(path, change, length=None):
    """Rewrites the JSON in front of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    front = len(header) if length is None else length
    path.write_bytes(front.to_bytes(8, "little") + header + data[8 + size :])


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (lambda header: header, 1 << 62),
        (lambda header: header, 3),
        (lambda header: b"x" * len(header), None),
        (lambda header: b"[1]", None),
        # Values that would lie behind the end of the file, or on those of another.
        (
            lambda header: header.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
            None,
        ),
        (lambda header: header.replace(b'"shape":[112,', b'"shape":[113,'), None),
    ],
)
def test_wrong_headers(folder, change, length):
    path = folder / "model.safetensors"
    change_header(path, change, length)
    with pytest.raises(UserError, match="model.safetensors cannot be read") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_pointer_of_git_lfs(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)
    with pytest.raises(UserError, match="is a Git LFS pointer, .*; run git lfs pull"):
        load(folder)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


def test_index_that_names_the_wrong_shard(folder):
    first, second = shard(folder)
    held = load_file(folder / first)
    name = next(iter(held))
    change_index(folder, lambda names: names.update({name: second}))
    with pytest.raises(
        UserError, match=f"says that {second} holds tensor {name}, {first} does;"
    ):
        load(folder)


def test_index_that_names_a_tensor_nobody_has(folder):
    first, _ = shard(folder)
    change_index(folder, lambda names: names.update(ghost=first))
    with pytest.raises(UserError, match="holds tensor ghost, which no file does;"):
        load(folder)


def test_index_that_lacks_a_tensor(folder):
    first, _ = shard(folder)
    name = next(iter(load_file(folder / first)))
    change_index(folder, lambda names: names.pop(name))
    with pytest.raises(UserError, match=f"{name}, which model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("file", ["../b.safetensors", 3, ""])
def test_index_that_leads_elsewhere(folder, file):
    shard(folder)
    change_index(folder, lambda names: names.update({QUERY: file}))
    with pytest.raises(UserError, match=f"tensor {QUERY} into .* no file of its"):
        load(folder)


@pytest.mark.parametrize("meant", [0, 1])
def test_an_index_says_which_of_two_shards_holds_a_tensor(folder, good, meant):
    files = shard(folder)
    held = [load_file(folder / file) for file in files]
    name = next(iter(held[meant]))
    held[1 - meant][name] = np.zeros_like(held[meant][name])
    save_file(held[1 - meant], folder / files[1 - meant])
    assert same_parameters(load(folder).model, good.model)


@pytest.mark.parametrize("index", [True, False])
def test_tensor_in_two_shards(folder, index):
    """And no index, or none that names it, says which one counts."""
    first, second = shard(folder)
    held = load_file(folder / first)
    name = next(iter(held))
    save_file({**load_file(folder / second), name: held[name]}, folder / second)
    if index:
        change_index(folder, lambda names: names.pop(name))
    else:
        (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=f"{name} is both in .*{first} and in {second}"):
        load(folder)


def test_shards_without_an_index(folder, good):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert same_parameters(load(folder).model, good.model)


def test_the_same_weights_under_another_name_are_left_alone(folder, good):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert same_parameters(load(folder).model, good.model)


@pytest.mark.parametrize(
    ("kind", "name"), [("F8_E4M3", "float8_e4m3fn"), ("U8", "uint8"), ("BOOL", "bool")]
)
def test_dtypes_that_hold_no_plain_weights(folder, kind, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[QUERY] = np.ones((64, 64), np.uint8)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "model.safetensors"
    change_header(path, lambda header: header.replace(b'"U8"', f'"{kind}"'.encode()))
    with pytest.raises(UserError, match=f"{QUERY} is {name}; quantised weights are"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", "float64", "halves", 3])
def test_dtypes_that_no_model_has(dtype):
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, flo"):
        load(GOLDEN / "llama_grouped", dtype)


def test_progress_covers_every_parameter(good):
    seen = []

    def watch(items):
        for item in items:
            seen.append(item)
            yield item

    load(GOLDEN / "llama_grouped", progress=watch)
    assert len(seen) == len(set(seen)) == 3 + 6 * good.config.num_layers
