"""What tokenizers are, and text from their tokens, piece by piece.

Decoding is defined on bytes: every token stands for a run of bytes, a text is the UTF-8
reading of their concatenation. That makes a stream exact at constant cost per token,
whichever tokenizer it comes from and wherever the stream is cut.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.chat import ChatTemplate
from treespec_jax.checkpoints.tokenizers.settings import TokenizerSettings
from treespec_jax.checks import check_text
from treespec_jax.errors import UserError

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# `leading_spaces` of a tokenizer that drops every space at the start of a text.
ALL_SPACES = 1 << 30


class Tokenizer:
    """Text to token ids and back; a subclass for every kind of vocabulary.

    A subclass sets `file_name` and the sizes, and overrides `piece`, `_encode` and
    `_token_bytes`.

    Example:

      tokenizer = load_tokenizer("model/tokenizer.json")
      tokenizer.decode(tokenizer.encode("once upon a time"))  # "once upon a time"

    Args:
      data: the vocabulary, as its file holds it.
      settings: what comes with it.
      bos_id: token in front of a text, or None.
      eos_ids: tokens that end a text.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      core_size: ids from here on are tokens that were added to a finished vocabulary.
      bos_id: token in front of a text, or None.
      eos_ids: tokens that end a text.
      leading_spaces: how many spaces at the very start of a text are not part of it
        (sentencepiece puts one there before it splits).
      file_name: name of its file inside a converted checkpoint.
      source: what messages call it, the path of its file for example.
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
        """Token ids of a text, after `bos_id` if wanted and there is one.

        The spelling of a special token inside the text is that token.

        Raises:
          UserError: the text holds half a character, which has no bytes in UTF-8.
        """
        check_text("the text", text)
        front = [self.bos_id] if add_bos and self.bos_id is not None else []
        return front + self._encode(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be written; the template may yet be malformed."""
        return self._settings.template is not None

    def chat_template(self) -> ChatTemplate:
        """How a conversation is written. Raises UserError: there is no template."""
        if self._template is None:
            template = self._settings.template
            if template is None:
                raise UserError(
                    f"no chat template beside {self.source}: neither "
                    "chat_template.jinja nor a chat_template in tokenizer_config.json; "
                    "take a model that was trained for chat, or generate without it"
                )
            self._template = ChatTemplate(template, self._named_tokens())
        return self._template

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        # The template writes the token in front of the text itself, where there is one.
        text = self.chat_template().render(messages, variables)
        return self.encode(text, add_bos=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control tokens leave no trace, broken UTF-8 is U+FFFD."""
        stream = TextStream(self)
        return stream.push(ids) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens.

        Nor for ids past the vocabulary: an embedding may be padded with rows that
        stand for no token, and a model may still emit one.
        """
        data = self._known.get(token)
        if data is None:
            if token >= self.vocab_size:
                return b""
            self._check(token)
            data = self._known[token] = self._token_bytes(token)
        return data

    def save(self, folder: Path) -> None:
        """Writes files into a folder that `load_tokenizer` reads back."""
        files = {self.file_name: self._data, **self._settings.files()}
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""
        raise NotImplementedError

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f"token id {token} is outside the tokenizer's {self.vocab_size} pieces"
            )

    def _named_tokens(self) -> dict[str, str]:
        """Spellings by role, "bos_token" for example, for the chat template.

        What a configuration leaves out of its roles is left out on purpose.
        """
        named = {role: token.content for role, token in self._settings.named.items()}
        return named or self._model_tokens()

    def _model_tokens(self) -> dict[str, str]:
        """Spellings by role that the vocabulary itself knows."""
        return {}

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError


class TextStream:
    """Decodes tokens as they come.

    The texts that `push` and `flush` return concatenate to what the tokens add to the
    text of `context_ids`: a space in front of the first word is kept after a prompt,
    and dropped where `decode` drops it, at the start of a text. Bytes that are not
    UTF-8 become U+FFFD.

    Args:
      tokenizer: names the bytes of a token.
      context_ids: tokens in front of the stream, a prompt for example.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Iterable[int] = ()):
        self._bytes = tokenizer.token_bytes
        self._leading = tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(context_ids)

    def push(self, ids: Iterable[int]) -> str:
        """Takes tokens; returns the characters that are now complete."""
        data = b"".join(self._bytes(int(token)) for token in ids)
        if self._leading and data:
            text = data.lstrip(b" ")
            dropped = min(len(data) - len(text), self._leading)
            data = data[dropped:]
            self._leading = 0 if data else self._leading - dropped
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the stream; returns U+FFFD for a character that stayed incomplete."""
        return self._utf8.decode(b"", final=True)


def damaged(source: str, what: str) -> UserError:
    """The error of a vocabulary that is not `what`."""
    return UserError(
        f"{source} is not {what}, or is damaged; copy or download it again"
    )
