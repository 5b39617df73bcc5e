"""GGUF files on the command line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.checkpoints import gguf_files
from tests.checkpoints.support import train_sentencepiece
from tests.conftest import TINY
from treespec_jax.checkpoints import describe, load_tokenizer
from treespec_jax.checkpoints.families import name_table

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model of one layer, with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = load_tokenizer(train_sentencepiece(folder))
    size = tokenizer.vocab_size
    config = dataclasses.replace(TINY, vocab_size=size, num_layers=1)
    rng = np.random.default_rng(0)
    tensors = {
        piece.name: rng.normal(0, 0.2, piece.shape).astype(np.float32)
        for piece in name_table(config, ()).pieces
    }
    raw, _ = gguf_files.convert(config, tensors, ("Q8_0", "F16"))
    metadata = gguf_files.metadata_of(config) | {"tokenizer.chat_template": TEMPLATE}
    metadata |= gguf_files.sentencepiece_vocabulary(tokenizer._model)
    return gguf_files.write(folder / "model.gguf", metadata, raw)


def test_a_file_converts(run_script, model, tmp_path):
    output = tmp_path / "converted"
    done = run_script("convert_checkpoint.py", f"--input={model}", f"--output={output}")
    assert done.code == 0, done.err
    assert "in float32, tokenizer.model" in done.out
    file, folder = describe(model), describe(output)
    assert folder.config == file.config
    messages = [{"role": "user", "content": "the cat"}]
    expected = file.tokenizer.encode_chat(messages)
    assert folder.tokenizer.encode_chat(messages) == expected


@pytest.mark.slow
def test_a_file_is_a_target(run_script, model):
    flags = [f"--target={model}", "--method=none", "--tree=none", "--max_len=64"]
    flags += ["--chat", "--prompt=the cat", "--max_tokens=6", "--ignore_eos", "--json"]
    done = run_script("generate.py", *flags)
    assert done.code == 0, done.err
    (completion,) = json.loads(done.out)["completions"]
    assert len(completion["token_ids"]) == 6


def test_mistakes_are_one_line(refuses, model, tmp_path):
    bad, output = tmp_path / "bad.gguf", tmp_path / "out"
    bad.write_bytes(model.read_bytes()[:-4000])
    flags = [f"--input={bad}", f"--output={output}"]
    refuses("bad.gguf cannot be read", "convert_checkpoint.py", *flags)
    assert not output.exists() and list(tmp_path.iterdir()) == [bad]
    flags = [f"--target={bad}", "--method=none", "--tree=none", "--prompt=x"]
    refuses("bad.gguf cannot be read", "generate.py", *flags)
    bad.write_bytes(b"GGUF\1" + bytes(40))
    refuses("is a GGUF file of version 1", "generate.py", *flags)
