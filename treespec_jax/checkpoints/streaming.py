"""Token ids to text, piece by piece, without ever splitting a character.

Decoding is defined on bytes: every token stands for a run of bytes, a text is the UTF-8
reading of their concatenation. That makes a stream exact at constant cost per token,
whichever tokenizer it comes from and wherever the stream is cut.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

# `leading_spaces` of a tokenizer that drops every space at the start of a text.
ALL_SPACES = 1 << 30


@runtime_checkable
class TokenBytes(Protocol):
    """What a stream needs of a tokenizer.

    Attributes:
      leading_spaces: how many spaces at the very start of a text are not part of it
        (sentencepiece puts one there before it splits).
    """

    leading_spaces: int

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens."""


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

    def __init__(self, tokenizer: TokenBytes, context_ids: Iterable[int] = ()):
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


def decode(tokenizer: TokenBytes, ids: Iterable[int]) -> str:
    """The text of a whole sequence of tokens."""
    stream = TextStream(tokenizer)
    return stream.push(ids) + stream.flush()
