"""Reads any checkpoint that the package knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints import huggingface, llama2c, native
from treespec_jax.checkpoints.placement import Progress, build, check_dtype
from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
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
    """

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer | None
    source: str
    dtype: np.dtype


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
        the tokenizer has more pieces than the model has embeddings.
    """
    path = Path(path).expanduser()
    wanted = None if dtype is None else check_dtype(dtype)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; check the path")
    if native.is_native(path):
        return _finish(*native.read(path, wanted, progress), tokenizer, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} holds no checkpoint: neither {native.METADATA} (written by "
                "convert_checkpoint.py) nor config.json (Hugging Face)"
            )
        config = huggingface.llama_config(path / "config.json")
        source = huggingface.SafetensorsSource(path)
        table = huggingface.llama_table(config)
        ignored = huggingface.llama_ignored(config)
        found = find_tokenizer(path)
    elif path.suffix == ".bin":
        source = llama2c.Llama2cSource(path)
        config = source.config
        table, ignored = llama2c.name_table(config), llama2c.IGNORED
        found = _beside(path)
    else:
        raise UserError(
            f"{path} is of an unknown kind; give a folder, or a llama2.c .bin file"
        )
    reader = None
    if tokenizer is None and found is not None:
        # Read before the weights: cheap, and the likelier of the two to fail.
        own_eos = () if path.suffix == ".bin" else config.eos_ids
        reader = load_tokenizer(found, eos_ids=own_eos)
    wanted = check_dtype(wanted or source.dtype)
    model = build(config, wanted, table, source, ignored, progress)
    return _finish(config, model, reader, path.name, wanted, tokenizer, path)


def _finish(config, model, found, source, dtype, chosen, path) -> LoadedModel:
    tokenizer = found if chosen is None else load_tokenizer(chosen)
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model at "
                f"{path} only {config.vocab_size} embeddings; give the tokenizer that "
                "belongs to it"
            )
        ends = dict.fromkeys([*config.eos_ids, *tokenizer.eos_ids])
        config = dataclasses.replace(
            config, bos_id=tokenizer.bos_id, eos_ids=tuple(ends)
        )
    return LoadedModel(config, model, tokenizer, source, dtype)


def _beside(path: Path) -> Path | None:
    """The tokenizer of a llama2.c file: of the same stem, or the folder's only one."""
    for suffix in (".model", ".json"):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    found = find_tokenizer(path.parent)
    return None if found == path else found
