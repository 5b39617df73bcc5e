"""The package's own folders: round trips, replacement, damage."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.contract import FormatContract
from tests.checkpoints.support import (
    SMALL,
    same_parameters,
    write_llama2c_tokenizer,
)
from treespec_jax.checkpoints import (
    LoadedModel,
    check_output,
    describe,
    load,
    load_tokenizer,
    save,
    saving,
)
from treespec_jax.checkpoints.formats import native
from treespec_jax.checkpoints.tokenizers import check_rows
from treespec_jax.checkpoints.widening import widen, widened_config
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


class TestContract(FormatContract):
    format = native.NativeFormat

    @pytest.fixture
    def checkpoint(self, tmp_path, model, tokenizer):
        loaded = LoadedModel(SMALL, model, tokenizer, "here", jnp.dtype("float32"))
        save(loaded, tmp_path / "stored")
        return tmp_path / "stored"


def files_of(folder):
    """Every file below a folder, by its relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tok.bin"
    reader = load_tokenizer(write_llama2c_tokenizer(path, [("he", -1.0)]))
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    return LoadedModel(SMALL, model, reader, "made here", jnp.dtype("float32"))


@pytest.fixture
def stored(small, tmp_path):
    save(small, tmp_path / "stored")
    return tmp_path / "stored"


@pytest.mark.parametrize("name", ["llama_grouped", "qwen2", "gemma3_multimodal"])
def test_hugging_face_round_trip(name, tmp_path):
    original = load(GOLDEN / name)
    save(original, tmp_path / "out")
    again = load(tmp_path / "out")
    assert same_parameters(original.model, again.model)
    assert again.config == original.config
    assert (again.dtype, again.tokenizer) == (original.dtype, None)


def test_a_stored_tokenizer_may_be_far_smaller_than_the_embedding(small, tmp_path):
    """A widened model has more rows than tokens; its folder needs no --tokenizer."""
    large = widen(
        small, widened_config(small.config, {"vocab_size": 900, "embed_dim": 18})
    )
    save(large, tmp_path / "large")
    again = load(tmp_path / "large")
    assert again.config.vocab_size == 900
    assert again.tokenizer.vocab_size == small.tokenizer.vocab_size
    with pytest.raises(UserError, match="more than padding explains"):
        check_rows(again.tokenizer, 900)


def test_dtype_on_the_way_out_and_in(small, tmp_path):
    save(small, tmp_path / "half", dtype="bfloat16")
    half = load(tmp_path / "half")
    assert half.dtype == jnp.bfloat16
    assert describe(tmp_path / "half").dtype == "bfloat16"
    expected = small.model.embedding[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(half.model.embedding[...], expected)
    single = load(tmp_path / "half", "float32")
    np.testing.assert_array_equal(
        single.model.embedding[...], expected.astype(jnp.float32)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(single.model))


def test_parameters_keep_their_logical_axes(stored):
    qkv = load(stored).model.layers[0].attention.qkv
    assert qkv.get_metadata("logical_axes") == (
        "kv_heads",
        "qkv",
        "head_dim",
        "embed",
    )


def test_folder_is_small_and_names_no_place(stored, tmp_path):
    held = files_of(stored)
    assert len(held) < 25
    assert {"metadata.json", "tokenizer.bin"} <= set(held)
    weights = sum(
        leaf.nbytes for leaf in jax.tree.leaves(nnx.state(load(stored).model))
    )
    assert sum(map(len, held.values())) < weights + 60_000
    assert not [name for name, data in held.items() if str(tmp_path).encode() in data]


def test_earlier_output_is_replaced_and_nothing_left_beside(small, stored):
    doubled = jax.tree.map(lambda x: 2 * x, small.model)
    save(dataclasses.replace(small, model=doubled, tokenizer=None), stored)
    again = load(stored)
    assert again.tokenizer is None
    assert same_parameters(again.model, doubled)
    assert os.listdir(stored.parent) == ["stored"]


def test_converting_in_place(stored):
    before = load(stored)
    save(before, stored, dtype="bfloat16")
    assert load(stored).dtype == jnp.bfloat16
    assert load(stored).tokenizer is not None


def test_empty_folder_is_taken(small, tmp_path):
    (tmp_path / "empty").mkdir()
    save(small, tmp_path / "empty")
    load(tmp_path / "empty")


def test_something_else_is_not_overwritten(small, tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="is not empty and not a converted checkpoint"):
        save(small, tmp_path)
    with pytest.raises(UserError, match="diary.txt is a file; choose a folder"):
        check_output(tmp_path / "diary.txt")
    (tmp_path / "metadata.json").write_text('{"format": "of another program"}')
    with pytest.raises(UserError, match="not a converted checkpoint"):
        check_output(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


def test_output_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder that can be written"):
        save(small, tmp_path / "file" / "out")


def test_interruption_leaves_the_earlier_output(small, stored, monkeypatch):
    before = files_of(stored)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_group", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        save(small, stored)
    assert files_of(stored) == before
    assert os.listdir(stored.parent) == ["stored"]


def test_model_that_is_not_finite_is_not_stored(small, tmp_path):
    broken = jax.tree.map(lambda x: x, small.model)
    broken.norm.scale[...] = broken.norm.scale[...].at[3].set(jnp.nan)
    with pytest.raises(UserError, match="tensor norm.scale holds NaN or infinity"):
        save(dataclasses.replace(small, model=broken), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_metadata(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_model(folder, **changes):
    model = json.loads((folder / "metadata.json").read_text())["model"]
    change_metadata(folder, model={**model, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "was not written by treespec-jax"),
        ({"version": 9}, "version 9 is not known here, only 2"),
        ({"model": None}, "lacks 'model'"),
        ({"tokenizer": {}}, None),
        ({"tokenizer": {"name": 1}}, "tokenizer lacks 'file'"),
        ({"tokenizer": {"file": "gone.model"}}, "no tokenizer at .*gone.model"),
        ({"dtype": "int4"}, "dtype must be one of"),
    ],
)
def test_metadata_out_of_order(stored, changes, message):
    change_metadata(stored, **changes)
    if message is None:
        assert load(stored).tokenizer is None
        return
    with pytest.raises(UserError, match=message):
        load(stored)


def test_damaged_metadata(stored):
    (stored / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json is not JSON"):
        load(stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_dim": 32}, r"mlp.down has shape \[16, 24\], .* wants \[16, 32\]"),
        ({"num_layers": 3}, "tensor layers.2.attention.out is missing"),
        ({"num_layers": 1}, "layers.1.attention.out and 5 more would stay unread"),
        ({"tied_embeddings": True}, "tensor head would stay unread"),
        ({"colour": "red"}, "unknown key 'colour' in .*metadata.json: model"),
        ({"head_dim": 5}, "head_dim must be even"),
    ],
)
def test_weights_of_another_configuration(stored, changes, message):
    change_model(stored, **changes)
    with pytest.raises(UserError, match=message):
        load(stored)


def test_missing_parameters(stored):
    for path in sorted((stored / "params").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"params/.* cannot be read \(No such file"):
        load(stored)
    for files in ({}, None, []):
        change_metadata(stored, files=files)
        with pytest.raises(UserError, match="metadata.json lacks 'files'"):
            load(stored)


def test_every_damaged_file_is_named(stored):
    for path in sorted((stored / "params").rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=f"{path} .* bytes instead of {len(data)}"):
            load(stored)
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(UserError, match=f"{path} .*its checksum is not that"):
            load(stored)
        path.write_bytes(data)
    load(stored)


def test_damage_without_checksums_is_one_line(stored, monkeypatch):
    """What tensorstore says of files that are cut short or gone."""
    monkeypatch.setattr(native, "check_files", lambda *_: None)
    values = files_of(stored / "params")
    messages = []
    for name in values:
        path = stored / "params" / name
        for data in (values[name][: len(values[name]) // 2], None):
            path.unlink() if data is None else path.write_bytes(data)
            try:
                load(stored)  # some files say nothing of values
            except UserError as error:
                messages.append(str(error))
            path.write_bytes(values[name])
    assert len(messages) > 4
    assert all("\n" not in message and len(message) < 400 for message in messages)
    assert any("/params cannot be read (" in message for message in messages)


def test_orbax_reads_what_we_write(small, stored):
    """The files are orbax's own: its restore is an independent reader of them."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        folder = stored / "params" / "0000"
        held = checkpointer.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held)
        args = ocp.args.PyTreeRestore(restore_args=how)
        tree = checkpointer.restore(folder, args=args)
    found = tree["layers"]["1"]["attention"]["qkv"]
    np.testing.assert_array_equal(found, small.model.layers[1].attention.qkv[...])
    assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(nnx.state(small.model)))


def test_several_groups(small, tmp_path, monkeypatch):
    """As a large model is written: parameters in folders of their own."""
    monkeypatch.setattr(saving, "_GROUP", 5000)
    save(small, tmp_path / "out")
    folders = sorted(path.name for path in (tmp_path / "out" / "params").iterdir())
    assert folders == [f"{i:04d}" for i in range(len(folders))] and len(folders) > 5
    assert same_parameters(load(tmp_path / "out").model, small.model)
    path = tmp_path / "out" / "params" / "0003"
    (path / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="0003/manifest.ocdbt cannot be read"):
        load(tmp_path / "out")


def test_a_relative_path_reads(stored, monkeypatch):
    """As typed on a command line: the folder's name, from where it lies."""
    monkeypatch.chdir(stored.parent)
    assert load(stored.name).config == load(stored).config
