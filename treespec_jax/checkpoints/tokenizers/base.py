"""The protocol of tokenizers, and what the implementations share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from treespec_jax.checkpoints.chat import ChatTemplate, no_template
from treespec_jax.checkpoints.streaming import decode
from treespec_jax.checkpoints.tokenizers.settings import TokenizerSettings
from treespec_jax.errors import UserError

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Example:

      tokenizer = load_tokenizer("model/tokenizer.json")
      tokenizer.decode(tokenizer.encode("once upon a time"))  # "once upon a time"

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      core_size: ids from here on are tokens that were added to a finished vocabulary.
      bos_id: token in front of a text, or None.
      eos_ids: tokens that end a text.
      leading_spaces: spaces at the start of a text that decoding drops.
      file_name: name of its file inside a converted checkpoint.
      source: what messages call it, the path of its file for example.
    """

    vocab_size: int
    core_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    leading_spaces: int
    file_name: str
    source: str

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text, after `bos_id` if wanted and there is one.

        The spelling of a special token inside the text is that token.
        """

    def chat_template(self) -> ChatTemplate:
        """How a conversation is written. Raises UserError: there is no template."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control tokens leave no trace, broken UTF-8 is U+FFFD."""

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens.

        Nor for ids past the vocabulary: an embedding may be padded with rows that
        stand for no token, and a model may still emit one.
        """

    def save(self, folder: Path) -> None:
        """Writes files into a folder that `load_tokenizer` reads back."""


class Base:
    """What the implementations share; nothing here is read from a file.

    Args:
      data: the vocabulary, as its file holds it.
      settings: what comes with it.
      bos_id: token in front of a text, or None.
      eos_ids: tokens that end a text.
    """

    file_name = ""
    leading_spaces = 0
    vocab_size: int
    core_size: int

    def __init__(
        self,
        data: bytes,
        settings: TokenizerSettings,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
    ):
        self.source = settings.source
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self._data = data
        self._settings = settings
        self._known: dict[int, bytes] = {}
        self._template: ChatTemplate | None = None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        front = [self.bos_id] if add_bos and self.bos_id is not None else []
        return front + self._encode(text)

    def chat_template(self) -> ChatTemplate:
        if self._template is None:
            template = self._settings.template
            if template is None:
                raise no_template(self.source)
            self._template = ChatTemplate(template, self._named_tokens())
        return self._template

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        # The template writes the token in front of the text itself, where there is one.
        text = self.chat_template().render(messages, variables)
        return self.encode(text, add_bos=False)

    def decode(self, ids: Iterable[int]) -> str:
        return decode(self, ids)

    def token_bytes(self, token: int) -> bytes:
        data = self._known.get(token)
        if data is None:
            if token >= self.vocab_size:
                return b""
            self._check(token)
            data = self._known[token] = self._token_bytes(token)
        return data

    def save(self, folder: Path) -> None:
        files = {self.file_name: self._data, **self._settings.files()}
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f"token id {token} is outside the tokenizer's {self.vocab_size} pieces"
            )

    def _named_tokens(self) -> dict[str, str]:
        """Spellings by role, "bos_token" for example, for the chat template."""
        return {}

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def piece(self, token: int) -> str:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError


def damaged(source: str, what: str) -> UserError:
    """The error of a vocabulary that is not `what`."""
    return UserError(
        f"{source} is not {what}, or is damaged; copy or download it again"
    )
