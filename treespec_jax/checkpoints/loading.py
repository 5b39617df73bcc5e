"""Reads any checkpoint that the package knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints import families, llama2c, native
from treespec_jax.checkpoints.description import HUGGINGFACE, NATIVE, describe
from treespec_jax.checkpoints.placement import Progress, build, check_dtype
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
      config: shape and constants; `bos_id` is the tokenizer's if there is one, and
        `eos_ids` holds its ends of text too.
      model: the decoder, its parameters in `dtype`.
      tokenizer: or None if the checkpoint has none.
      source: name of the file or folder that it came from.
      dtype: of the parameters.
      notes: what of the checkpoint was left out, a line each.
    """

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer | None
    source: str
    dtype: np.dtype
    notes: tuple[str, ...] = ()


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress = iter,
) -> LoadedModel:
    """Reads a checkpoint.

    Args:
      path: a Hugging Face Llama folder, a llama2.c version 0 `.bin` file, or a folder
        that `save` wrote.
      dtype: float32, bfloat16 or float16; None: as stored.
      tokenizer: a file to use instead of the one found with the weights.
      progress: wraps the list of parameters as they are read, to show a bar.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a tensor is
        missing, unread, of the wrong shape or not finite; a setting is not supported;
        the tokenizer does not fit the embedding (see `check_rows`).
    """
    wanted = None if dtype is None else check_dtype(dtype)
    about = describe(path, tokenizer)
    path, config = about.path, about.config
    if about.kind == NATIVE:
        wanted = wanted or check_dtype(about.dtype)
        model = native.read(path, config, wanted, progress)
    else:
        if about.kind == HUGGINGFACE:
            source = SafetensorsSource(path)
            names = families.name_table(config, source.shapes())
            table, ignored = names.pieces, names.ignored
        else:
            source = llama2c.Llama2cSource(path)
            table, ignored = llama2c.name_table(config), llama2c.IGNORED
        wanted = wanted or check_dtype(source.dtype)
        model = build(config, wanted, table, source, ignored, progress)
    return LoadedModel(config, model, about.tokenizer, path.name, wanted, about.notes)
