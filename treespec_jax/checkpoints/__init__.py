"""Checkpoints and tokenizers: read every format of `formats`, write one."""

from __future__ import annotations

import importlib

from treespec_jax.checkpoints.formats import Description, describe
from treespec_jax.checkpoints.tokenizers import load_tokenizer

# Loaded on first use: a checkpoint can be described without starting jax.
_WITH_JAX = {
    "LoadedModel": "treespec_jax.checkpoints.loading",
    "check_output": "treespec_jax.checkpoints.saving",
    "convert": "treespec_jax.checkpoints.conversion",
    "load": "treespec_jax.checkpoints.loading",
    "save": "treespec_jax.checkpoints.saving",
}

__all__ = ["Description", "describe", "load_tokenizer", *_WITH_JAX]


def __getattr__(name: str):
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_JAX[name]), name)
