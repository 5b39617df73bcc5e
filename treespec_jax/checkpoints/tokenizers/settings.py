"""What comes with a vocabulary: special tokens and the chat template."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.chat import TEMPLATE_FILES, TemplateSource, find_template
from treespec_jax.checkpoints.files import parse_json
from treespec_jax.errors import UserError

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
ADDED = "added_tokens.json"
# Classes of transformers, less "Fast", that put a token in front of a text themselves.
_ADDING = (
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "CohereTokenizer",
)
# The files beside a vocabulary that a copy needs to encode as the original does.
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
    """What a tokenizer is made of, besides its vocabulary.

    Attributes:
      source: what messages call the tokenizer, the path of its file for example.
      bos_id: token in front of a text; None: what the other fields and the vocabulary
        say.
      eos_ids: tokens that end a text; empty: what they say.
      named: special tokens by role ("bos_token", "eos_token", …).
      added: added tokens by id.
      others: further special tokens, ids left to the vocabulary.
      add_bos: whether a text begins with the token of that name; None: not said.
      legacy: whether every stretch of text between added tokens is encoded as if it
        began the text, as the first Llama tokenizers did.
      template: how conversations are written, or None.
      companions: contents by name of the files that these settings were read from;
        None: they were not read from files.
    """

    source: str
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    named: Mapping[str, AddedToken] = dataclasses.field(default_factory=dict)
    added: Mapping[int, AddedToken] = dataclasses.field(default_factory=dict)
    others: tuple[AddedToken, ...] = ()
    add_bos: bool | None = None
    legacy: bool = True
    template: TemplateSource | None = None
    companions: Mapping[str, bytes] | None = None

    def files(self) -> dict[str, bytes]:
        """Files by name that `parse_settings` reads these settings back from."""
        if self.companions is not None:
            return dict(self.companions)
        values: dict[str, Any] = {
            **{role: dataclasses.asdict(token) for role, token in self.named.items()},
            "added_tokens_decoder": {
                str(token_id): dataclasses.asdict(token)
                for token_id, token in self.added.items()
            },
            "additional_special_tokens": list(map(dataclasses.asdict, self.others)),
            "add_bos_token": self.add_bos,
            "legacy": self.legacy,
        }
        if self.template is not None:
            programs = self.template.programs.items()
            values["chat_template"] = [dict(name=n, template=t) for n, t in programs]
        return {CONFIG: json.dumps(values, indent=2, ensure_ascii=False).encode()}


def parse_settings(files: Mapping[str, bytes], tokenizer: Path) -> TokenizerSettings:
    """The settings that the files beside a tokenizer hold.

    Args:
      files: contents by name; the names are among `COMPANIONS`.
      tokenizer: the path of the vocabulary's file.

    Raises:
      UserError: a file is no JSON object, or an added token is malformed.
    """
    folder = tokenizer.parent
    found = {
        name: parse_json(files[name], folder / name) if name in files else {}
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
    kind = config.get("tokenizer_class")
    if add_bos and isinstance(kind, str) and kind.removesuffix("Fast") not in _ADDING:
        # Others leave it to the vocabulary's post-processor.
        add_bos = None
    return TokenizerSettings(
        source=str(tokenizer),
        named=named,
        added=dict(sorted(added.items())),
        others=tuple(others),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=config.get("legacy") is not False,
        template=find_template(files, folder),
        companions=dict(files),
    )


def _token(path: Path, value: Any, special: bool = False) -> AddedToken:
    content = _spelling(value)
    if not content:
        raise UserError(f"{path}: {value!r:.60} is no token; download it again")
    if not isinstance(value, Mapping):
        return AddedToken(content, special)
    special = special or bool(value.get("special"))
    normalized = bool(value.get("normalized", not special))
    names = ("lstrip", "rstrip", "single_word")
    flags = {name: bool(value.get(name)) for name in names}
    return AddedToken(content, special, normalized=normalized, **flags)


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
