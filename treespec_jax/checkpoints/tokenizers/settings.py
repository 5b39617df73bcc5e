"""What the files beside a tokenizer of Hugging Face say about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.chat import TEMPLATE_FILES
from treespec_jax.checkpoints.files import read_json
from treespec_jax.errors import UserError

CONFIG, MAP, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# All that a copied tokenizer needs to go on as before.
COMPANIONS = (CONFIG, MAP, ADDED, *TEMPLATE_FILES)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the text is split.

    Attributes:
      content: its spelling.
      special: control token, which leaves no trace in a text.
      lstrip, rstrip: takes the white space on that side along.
      single_word: is found between word boundaries only.
      normalized: is looked for in the normalised text.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The files of a folder, read.

    Attributes:
      path: of tokenizer_config.json, there or not.
      named: special tokens by role ("bos_token", "eos_token", …).
      added: added tokens by id.
      others: further special tokens, ids left to the vocabulary.
      add_bos: whether a text begins with the token of that name; None: not said.
      legacy: whether every stretch of text between added tokens is encoded as if it
        began the text, as the first Llama tokenizers did.
    """

    path: Path
    named: Mapping[str, AddedToken]
    added: Mapping[int, AddedToken]
    others: tuple[AddedToken, ...]
    add_bos: bool | None
    legacy: bool


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads what there is.

    Raises:
      UserError: a file is no JSON object, or an added token is malformed.
    """
    found = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in (CONFIG, MAP, ADDED)
    }
    config = found[CONFIG]
    values = {**found[MAP], **config}
    named, others = {}, []
    for role, value in values.items():
        if role.endswith("_token") and _spelling(value):
            named[role] = _token(folder / CONFIG, value, special=True)
        elif role in ("additional_special_tokens", "extra_special_tokens"):
            entries = value.values() if isinstance(value, Mapping) else value or ()
            others += [_token(folder / CONFIG, v, special=True) for v in entries]
    specials = {t.content for t in (*named.values(), *others)}
    added = {}
    for content, token in found[ADDED].items():
        special = content in specials
        added[_id(folder / ADDED, token)] = AddedToken(
            content, special, normalized=not special
        )
    for token, value in (config.get("added_tokens_decoder") or {}).items():
        added[_id(folder / CONFIG, token)] = _token(folder / CONFIG, value)
    add_bos = config.get("add_bos_token")
    return TokenizerSettings(
        path=folder / CONFIG,
        named=named,
        added=dict(sorted(added.items())),
        others=tuple(others),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=config.get("legacy") is not False,
    )


def _token(path: Path, value: Any, special: bool = False) -> AddedToken:
    content = _spelling(value)
    if not content:
        raise UserError(f"{path}: {value!r:.60} is no token; download it again")
    if not isinstance(value, Mapping):
        return AddedToken(content, special)
    flags = ("lstrip", "rstrip", "single_word")
    special = special or bool(value.get("special"))
    return AddedToken(
        content,
        special,
        **{name: bool(value.get(name)) for name in flags},
        normalized=bool(value.get("normalized", not special)),
    )


def _spelling(value: Any) -> str | None:
    """A token's text; older files hold it as a dictionary."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


def _id(path: Path, value: Any) -> int:
    try:
        token = int(value)
    except (TypeError, ValueError):
        token = -1
    if token < 0:
        raise UserError(f"{path}: {value!r:.60} is no token id; download it again")
    return token
