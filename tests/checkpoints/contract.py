"""What every format of checkpoints must do; subclassed by the tests of each format."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.support import (
    SMALL,
    same_parameters,
    write_llama2c_tokenizer,
)
from treespec_jax.checkpoints import convert, describe, load, load_tokenizer
from treespec_jax.checkpoints.formats import FORMATS, Format, find_format
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer

ROOT = Path(__file__).resolve().parents[2]


class FormatContract:
    """Tests of one format.

    A subclass sets `format` and overrides the fixture `checkpoint`.

    Attributes:
      format: the class.
      keeps_tokenizer_file: whether a converted folder holds the tokenizer's own file.
    """

    format: type
    keeps_tokenizer_file = True

    @pytest.fixture(scope="class")
    def model(self):
        """What `checkpoint` holds, in float32."""
        return Transformer(SMALL, rngs=nnx.Rngs(0))

    @pytest.fixture(scope="class")
    def tokenizer(self, tmp_path_factory):
        """The tokenizer of `checkpoint`, of as many pieces as `SMALL`."""
        return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("vocabulary")))

    @pytest.fixture
    def checkpoint(self, tmp_path, model, tokenizer) -> Path:
        """Path of a file or folder with `model` and `tokenizer`.

        All files of the folder that holds it are its own.
        """
        raise NotImplementedError

    def test_claims_its_paths_alone(self, checkpoint):
        assert [type(f) for f in FORMATS if f.claims(checkpoint)] == [self.format]
        assert type(find_format(checkpoint)) is self.format
        assert isinstance(find_format(checkpoint), Format)

    def test_claims_nothing_else(self, tmp_path):
        (tmp_path / "folder.bin").mkdir()
        (tmp_path / "a.txt").write_text("{}")
        for name in ("none", "none.bin", "folder.bin", "a.txt", "."):
            assert not self.format().claims(tmp_path / name)
        assert self.format.expects in str(refusal(describe, tmp_path))

    def test_description_starts_no_jax(self, checkpoint):
        code = (
            "import sys; from treespec_jax import checkpoints, limits\n"
            f"about = checkpoints.describe({str(checkpoint)!r})\n"
            "print(about.config.num_layers, {'jax', 'flax'} & set(sys.modules))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert result.stdout == "2 set()\n", result.stderr

    def test_description_is_that_of_the_loaded_model(self, checkpoint, tokenizer):
        about, loaded = describe(checkpoint), load(checkpoint)
        assert about.config == loaded.config
        assert dataclasses.replace(
            about.config, eos_ids=SMALL.eos_ids, bos_id=SMALL.bos_id
        ) == dataclasses.replace(SMALL, family=about.config.family)
        assert about.path == checkpoint and loaded.source == checkpoint.name
        assert about.notes == loaded.notes == ()
        for reader in (about.tokenizer, loaded.tokenizer):
            assert reader.encode("he") == tokenizer.encode("he")
            assert (reader.bos_id, reader.eos_ids) == (1, (2,))
            assert str(checkpoint.parent) in reader.source

    def test_loads_equal_parameters(self, checkpoint, model):
        assert same_parameters(load(checkpoint).model, model)
        half = load(str(checkpoint), "bfloat16")
        assert half.dtype == half.model.embedding[...].dtype == "bfloat16"

    def test_a_description_is_not_made_again(self, checkpoint, model, monkeypatch):
        about = describe(checkpoint)
        monkeypatch.setattr(self.format, "describe", None)
        loaded = load(about)
        assert same_parameters(loaded.model, model)
        assert loaded.config is about.config and loaded.tokenizer is about.tokenizer

    def test_another_tokenizer_is_taken_instead(self, checkpoint, tmp_path_factory):
        chosen = small_tokenizer(tmp_path_factory.mktemp("other"), "the")
        about = describe(checkpoint)
        for source in (checkpoint, about):
            loaded = load(source, tokenizer=chosen)
            assert loaded.tokenizer.source == str(chosen)

    def test_source_reads_parts_of_tensors(self, checkpoint):
        about = describe(checkpoint)
        source = about.format.open(about).source
        shapes = source.shapes()
        assert source.dtypes() == dict.fromkeys(shapes, "float32")
        assert source.dtype == "float32" and source.path == checkpoint
        for name, shape in shapes.items():
            whole = source.read(name, tuple(slice(0, size) for size in shape))
            region = tuple(slice(size // 3, size // 3 + 1) for size in shape)
            np.testing.assert_array_equal(source.read(name, region), whole[region])
        assert all(file.is_file() for file in source.files())

    def test_converts(self, checkpoint, tmp_path_factory, model, tokenizer):
        output = tmp_path_factory.mktemp("converted") / "out"
        about = describe(checkpoint)
        convert(about, output)
        again = load(output)
        assert same_parameters(again.model, model)
        assert again.config == about.config
        text = "he said <s>"
        assert again.tokenizer.encode(text) == about.tokenizer.encode(text)
        if self.keeps_tokenizer_file:
            saved = (output / tokenizer.file_name).read_bytes()
            assert saved == Path(tokenizer.source).read_bytes()

    def test_files_cut_short_are_named(self, checkpoint):
        """Cut anywhere, a file gives one line that names it."""
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            data = file.read_bytes()
            # What ends a JSON file may be missing.
            length = len(data.rstrip()) if file.suffix == ".json" else len(data)
            for size in {0, length // 2, length - 1} if length else ():
                file.write_bytes(data[:size])
                message = str(refusal(load, checkpoint))
                assert file.name in message and "\n" not in message
            file.write_bytes(data)
        load(checkpoint)


def refusal(function, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        function(*args)
    return caught.value


def small_tokenizer(folder: Path, first: str = "he") -> Path:
    """A llama2.c tokenizer file of as many pieces as `SMALL` has rows."""
    pieces = [first, *map(chr, range(ord("A"), ord("A") + SMALL.vocab_size - 260))]
    return write_llama2c_tokenizer(
        folder / "tokenizer.bin", [(piece, -1.0 - i) for i, piece in enumerate(pieces)]
    )
