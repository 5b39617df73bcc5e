"""What a checkpoint says about itself before its weights are read; free of jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from treespec_jax.checkpoints.formats import Description, find_format
from treespec_jax.checkpoints.tokenizers import Tokenizer, check_rows, load_tokenizer
from treespec_jax.config import ModelConfig


def describe(path: str | Path, tokenizer: str | Path | None = None) -> Description:
    """Looks at a checkpoint; takes milliseconds.

    Args:
      path: as for `load`.
      tokenizer: a file to use instead of the one found with the weights.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a setting is not
        supported; the tokenizer does not fit the embedding (see `check_rows`).
    """
    path = Path(path).expanduser()
    found = find_format(path)
    header = found.describe(path)
    config, reader = header.config, None
    if tokenizer is not None:
        reader = load_tokenizer(tokenizer)
    elif header.tokenizer is not None:
        reader = header.tokenizer()
    if reader is not None:
        check_rows(reader, config.vocab_size, chosen=tokenizer is not None)
        config = _with_tokens(config, reader)
    return Description(config, reader, path, found, header.dtype, header.notes)


def _with_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    ends = dict.fromkeys([*config.eos_ids, *tokenizer.eos_ids])
    return dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=tuple(ends))
