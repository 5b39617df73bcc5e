"""`metadata.json` of the package's own folders; free of jax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import read_json
from treespec_jax.config import ModelConfig, from_mapping
from treespec_jax.errors import UserError

METADATA = "metadata.json"
FORMAT = "treespec-jax"
VERSION = 2


def is_native(path: Path) -> bool:
    """Whether `path` is, or claims to be, a folder that `save` wrote."""
    return (path / METADATA).is_file()


def read_metadata(path: Path) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The model's configuration, and all that the file at `path / METADATA` holds.

    Raises:
      UserError: written by something else or by a later version, or damaged.
    """
    values = read_json(path / METADATA)
    _check(path, values)
    config = from_mapping(ModelConfig, values["model"], f"{path / METADATA}: model")
    return config, values


def _check(path: Path, values: Mapping[str, Any]) -> None:
    where = path / METADATA
    if values.get("format") != FORMAT:
        raise UserError(f"{where} was not written by {FORMAT}; check the path")
    if values.get("version") != VERSION:
        raise UserError(
            f"{where}: version {values.get('version')!r} is not known here, only "
            f"{VERSION}; update {FORMAT}, or convert the original again"
        )
    if not isinstance(values.get("model"), dict):
        raise UserError(f"{where} lacks 'model'; convert the original again")
    tokenizer = values.get("tokenizer")
    if tokenizer and not (isinstance(tokenizer, dict) and "file" in tokenizer):
        raise UserError(f"{where}: tokenizer lacks 'file'; convert the original again")
