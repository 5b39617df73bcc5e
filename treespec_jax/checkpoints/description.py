"""What a checkpoint says about itself before its weights are read; free of jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from treespec_jax.checkpoints import huggingface, llama2c
from treespec_jax.checkpoints.metadata import METADATA, is_native, read_metadata
from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    check_rows,
    find_tokenizer,
    load_tokenizer,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

NATIVE, HUGGINGFACE, LLAMA2C = "native", "huggingface", "llama2c"


@dataclasses.dataclass(frozen=True)
class Description:
    """A checkpoint without its weights.

    Attributes:
      config: shape and constants; `bos_id` is the tokenizer's if there is one, and
        `eos_ids` holds its ends of text too.
      tokenizer: or None if the checkpoint has none.
      path: of the file or folder.
      kind: NATIVE, HUGGINGFACE or LLAMA2C.
      dtype: name of the stored parameters' dtype, where it is known without them.
      notes: what of the checkpoint is left out, a line each.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    path: Path
    kind: str
    dtype: str | None
    notes: tuple[str, ...] = ()


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
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; check the path")
    dtype, found, own, notes = None, None, {}, ()
    if is_native(path):
        kind = NATIVE
        config, values = read_metadata(path)
        dtype = values.get("dtype")
        about = values.get("tokenizer")
        if about:
            found = path / about["file"]
            own = {
                "bos_id": about.get("bos_id"),
                "eos_ids": tuple(about.get("eos_ids", ())),
            }
    elif path.is_dir():
        kind = HUGGINGFACE
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} holds no checkpoint: neither {METADATA} (written by "
                "convert_checkpoint.py) nor config.json (Hugging Face)"
            )
        config = huggingface.read_config(path / "config.json")
        notes = huggingface.read_notes(path / "config.json")
        found = find_tokenizer(path)
    elif path.suffix == ".bin":
        kind = LLAMA2C
        config = llama2c.Llama2cSource(path).config
        found = _beside(path)
    else:
        raise UserError(
            f"{path} is of an unknown kind; give a folder, or a llama2.c .bin file"
        )
    reader = None
    if tokenizer is not None:
        reader = load_tokenizer(tokenizer)
    elif found is not None:
        reader = load_tokenizer(found, **own)
    if reader is not None:
        check_rows(reader, config.vocab_size, chosen=tokenizer is not None)
        config = _with_tokens(config, reader)
    return Description(config, reader, path, kind, dtype, notes)


def _with_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    ends = dict.fromkeys([*config.eos_ids, *tokenizer.eos_ids])
    return dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_ids=tuple(ends))


def _beside(path: Path) -> Path | None:
    """The tokenizer of a llama2.c file: of the same stem, or the folder's only one."""
    for suffix in (".model", ".json"):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    found = find_tokenizer(path.parent)
    return None if found == path else found
