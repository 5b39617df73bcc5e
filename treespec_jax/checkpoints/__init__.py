"""Checkpoints and tokenizers: read every format of `formats`, write one."""

from __future__ import annotations

import importlib

from treespec_jax.checkpoints.description import describe
from treespec_jax.checkpoints.formats import Description
from treespec_jax.checkpoints.tokenizers import (
    TextStream,
    Tokenizer,
    check_rows,
    compare_vocabularies,
    load_tokenizer,
)

# Loaded on first use: a checkpoint can be described without starting jax.
_WITH_JAX = {
    "LoadedModel": "treespec_jax.checkpoints.loaded",
    "check_output": "treespec_jax.checkpoints.saving",
    "convert": "treespec_jax.checkpoints.conversion",
    "load": "treespec_jax.checkpoints.loading",
    "save": "treespec_jax.checkpoints.saving",
}

__all__ = [
    "Description",
    "LoadedModel",
    "TextStream",
    "Tokenizer",
    "check_output",
    "check_rows",
    "compare_vocabularies",
    "convert",
    "describe",
    "load",
    "load_tokenizer",
    "save",
]


def __getattr__(name: str):
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_JAX[name]), name)
