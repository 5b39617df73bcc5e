"""The kinds of checkpoint that can be read, in the order in which they are asked.

A new kind takes a module here and a line in `FORMATS`. Importing this starts no jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from treespec_jax.checkpoints import foreign, names
from treespec_jax.checkpoints.formats.gguf import GgufFormat
from treespec_jax.checkpoints.formats.huggingface import HuggingFaceFormat
from treespec_jax.checkpoints.formats.llama2c import Llama2cFormat
from treespec_jax.checkpoints.formats.native import NativeFormat
from treespec_jax.checkpoints.formats.protocol import Description, Format
from treespec_jax.checkpoints.tokenizers import check_rows, load_tokenizer
from treespec_jax.errors import UserError

__all__ = ["FORMATS", "Description", "Format", "describe", "find_format"]

FORMATS: tuple[Format, ...] = (
    NativeFormat(),
    HuggingFaceFormat(),
    GgufFormat(),
    Llama2cFormat(),
)


def find_format(path: Path) -> Format:
    """The format of the checkpoint at `path`.

    Raises:
      UserError: the path is missing, or no format claims it.
    """
    from treespec_jax.checkpoints import drafters

    if not path.exists():
        raise UserError(f"no checkpoint at {path}; check the path")
    if method := drafters.method_of(path):
        raise UserError(
            f"{path} holds a drafter of method {method!r}, which cannot speak without "
            "its target; name it as the drafter, with --draft"
        )
    foreign.check_folder(path)
    for known in FORMATS:
        if known.claims(path):
            return known
    *others, last = (known.expects for known in FORMATS)
    problem = "holds no checkpoint" if path.is_dir() else "is of an unknown kind"
    raise UserError(f"{path} {problem}; give {', '.join(others)} or {last}")


def describe(path: str | Path, tokenizer: str | Path | None = None) -> Description:
    """Reads what a checkpoint says about itself, without its weights; milliseconds.

    Of a repository of the hub this downloads what is small.

    Args:
      path: as for `load`.
      tokenizer: to use instead of the one found with the weights: a file, a folder, or
        a name.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a name that cannot
        be had (see `names.locate`); a setting is not supported; the tokenizer does not
        fit the embedding (see `check_rows`).
    """
    located = names.locate(path)
    path, repository = located.path, located.repository
    if repository is not None and repository.file is None:
        repository.check(path)
    found = find_format(path)
    about = dataclasses.replace(
        found.describe(path), name=located.name, repository=repository
    )
    if tokenizer is not None:
        reader = load_tokenizer(names.locate(tokenizer, "tokenizer").path)
    else:
        reader = found.read_tokenizer(path)
    if reader is None:
        return about
    chosen = tokenizer is not None or found.tokenizer_chosen
    check_rows(reader, about.config.vocab_size, chosen)
    config = dataclasses.replace(
        about.config,
        bos_id=reader.bos_id,
        eos_ids=tuple(dict.fromkeys([*about.config.eos_ids, *reader.eos_ids])),
    )
    return dataclasses.replace(about, config=config, tokenizer=reader)
