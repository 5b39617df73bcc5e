"""Trained parameters as one of our checkpoints, and checkpoints as teachers."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp

from treespec_jax import checkpoints
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer


def save_model(
    path: pathlib.Path,
    config: ModelConfig,
    model: Transformer,
    tokenizer_path: pathlib.Path,
    dtype: str,
) -> pathlib.Path:
    """Writes a model folder in place of an older one."""
    loaded = checkpoints.LoadedModel(
        config=config,
        model=model,
        tokenizer=checkpoints.load_tokenizer(tokenizer_path),
        # Not the path: a checkpoint travels.
        source=path.parent.name,
        dtype=jnp.float32,
    )
    checkpoints.save(loaded, path, dtype=jnp.dtype(dtype))
    return path


def load_model(path: str) -> tuple[ModelConfig, Transformer]:
    """A checkpoint of any kind in float32, as a teacher.

    Raises:
      UserError: it cannot be read.
    """
    loaded = checkpoints.load(path, dtype=jnp.float32)
    return loaded.config, loaded.model
