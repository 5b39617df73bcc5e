"""Hugging Face folders: `config.json`, `*.safetensors` and a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

from treespec_jax.checkpoints import families
from treespec_jax.checkpoints.formats.huggingface_config import read_config, read_notes
from treespec_jax.checkpoints.formats.protocol import Description, Header
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.checkpoints.tokenizers import find_tokenizer, load_tokenizer

_CONFIG = "config.json"


class HuggingFaceFormat:
    """See `Format`."""

    expects = f"a folder with {_CONFIG} (Hugging Face)"

    def claims(self, path: Path) -> bool:
        return (path / _CONFIG).is_file()

    def describe(self, path: Path) -> Header:
        found = find_tokenizer(path)
        return Header(
            read_config(path / _CONFIG),
            tokenizer=found and functools.partial(load_tokenizer, found),
            notes=read_notes(path / _CONFIG),
        )

    def open(self, description: Description) -> Tensors:
        source = SafetensorsSource(description.path)
        table = families.name_table(description.config, source.shapes())
        return Tensors(source, table.pieces, table.ignored)
