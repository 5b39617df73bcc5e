"""Which file of a folder is its tokenizer, and of which kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from treespec_jax.checkpoints.chat import find_template
from treespec_jax.checkpoints.files import read_bytes
from treespec_jax.checkpoints.tokenizers.base import Tokenizer
from treespec_jax.checkpoints.tokenizers.llama2c import Llama2cTokenizer
from treespec_jax.checkpoints.tokenizers.sentencepiece import SentencePieceTokenizer
from treespec_jax.checkpoints.tokenizers.settings import (
    COMPANIONS,
    TokenizerSettings,
    parse_settings,
)
from treespec_jax.checkpoints.tokenizers.tokenizer_json import HuggingFaceTokenizer
from treespec_jax.errors import UserError

_KINDS = {
    ".json": HuggingFaceTokenizer,
    ".model": SentencePieceTokenizer,
    ".bin": Llama2cTokenizer,
}


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder, or None.

    `tokenizer.json` stands for the model's own choice and wins over a sentencepiece
    file; of llama2.c files, `tokenizer.bin` or the only `tok*.bin`.
    """
    for kind in (HuggingFaceTokenizer, SentencePieceTokenizer, Llama2cTokenizer):
        if (folder / kind.file_name).is_file():
            return folder / kind.file_name
    others = sorted(folder.glob("tok*.bin"))
    return others[0] if len(others) == 1 else None


def load_tokenizer(
    path: str | Path, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()
) -> Tokenizer:
    """Reads the tokenizer at `path`, a file or a folder that holds one.

    Args:
      path: `*.model` (sentencepiece), `*.json` (tokenizers), `*.bin` (llama2.c).
      bos_id: token in front of a text; None: the file's own.
      eos_ids: tokens that end a text; empty: the file's own.

    Raises:
      UserError: nothing there, or unreadable, or a kind that is not known.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(
                f"{path} holds no tokenizer.json, tokenizer.model or tokenizer.bin"
            )
        path = found
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; check the path")
    if path.suffix not in _KINDS:
        raise UserError(
            f"tokenizer {path} is of an unknown kind; give a .model (sentencepiece), "
            ".json (tokenizers) or .bin (llama2.c) file"
        )
    kind = _KINDS[path.suffix]
    data = read_bytes(path)
    beside = {name: path.parent / name for name in COMPANIONS}
    files = {name: read_bytes(file) for name, file in beside.items() if file.is_file()}
    if kind is Llama2cTokenizer:
        # Holds its special tokens itself; of the files beside it a template counts.
        template = find_template(files, path.parent)
        settings = TokenizerSettings(str(path), template=template, companions={})
    else:
        settings = parse_settings(files, path)
    settings = dataclasses.replace(settings, bos_id=bos_id, eos_ids=tuple(eos_ids))
    return kind(data, settings)
