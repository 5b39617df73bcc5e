"""Hugging Face folders: `config.json`, `*.safetensors` and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from treespec_jax.checkpoints import families, foreign
from treespec_jax.checkpoints.formats.huggingface_config import read_config, read_notes
from treespec_jax.checkpoints.formats.protocol import Description
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)

_CONFIG = "config.json"


class HuggingFaceFormat:
    """See `Format`."""

    expects = f"a folder with {_CONFIG} (Hugging Face)"
    tokenizer_chosen = False

    def claims(self, path: Path) -> bool:
        return (path / _CONFIG).is_file()

    def describe(self, path: Path) -> Description:
        config, notes = read_config(path / _CONFIG), read_notes(path / _CONFIG)
        return Description(config, None, path, self, notes=notes)

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        found = find_tokenizer(path)
        return found and load_tokenizer(found)

    def open(self, description: Description) -> Tensors:
        source = SafetensorsSource(description.path)
        foreign.check_names(description.path, source.shapes())
        table = families.name_table(description.config, source.shapes())
        return Tensors(source, table.pieces, table.ignored)
