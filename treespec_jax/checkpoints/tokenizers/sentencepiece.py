"""Sentencepiece models, with the tokens that were added to them later."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterable, Mapping

from treespec_jax.checkpoints.tokenizers.base import (
    ALL_SPACES,
    SPACE,
    Tokenizer,
    damaged,
)
from treespec_jax.checkpoints.tokenizers.settings import TokenizerSettings

# A repeated message field of a protocol buffer is merged into the first: appended to a
# model, this sets `normalizer_spec.add_dummy_prefix` to false.
_NO_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model (Kudo & Richardson, 1808.06226).

    Added and special tokens are those of the settings; without any the text "</s>" is a
    text like any other. Stretches between added tokens are encoded by themselves, as
    the original (slow) Llama tokenizer does: with a space in front each, or, unless
    `legacy` is set, only at the start of the text.

    Args:
      data: a serialised `ModelProto`, the contents of a `.model` file.
      settings: what comes with it.

    Raises:
      UserError: the data is not a sentencepiece model.
    """

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, settings: TokenizerSettings):
        self._model = _processor(data, settings.source)
        size = self._model.vocab_size()
        self.core_size = size
        self._added = dict(settings.added)
        for token in (*settings.named.values(), *settings.others):
            token_id = self._find(token.content)
            if token_id is not None:
                self._added.setdefault(token_id, token)
        self.vocab_size = max([size - 1, *self._added]) + 1
        named = {role: self._find(t.content) for role, t in settings.named.items()}
        bos_id, eos_ids = settings.bos_id, settings.eos_ids
        if bos_id is None and settings.add_bos is not False:
            bos_id = named.get("bos_token", _or_none(self._model.bos_id()))
        if not eos_ids:
            eos = named.get("eos_token", _or_none(self._model.eos_id()))
            eos_ids = () if eos is None else (eos,)
        super().__init__(data, settings, bos_id, eos_ids)
        self.leading_spaces = self._find_leading_spaces()
        self._split = _pattern(self._added.values())
        self._by_text = {t.content: (i, t) for i, t in self._added.items()}
        self._inner = self._model
        if self._split and not settings.legacy:
            self._inner = _processor(data + _NO_PREFIX, settings.source)

    def piece(self, token: int) -> str:
        self._check(token)
        if token in self._added:
            return self._added[token].content
        return self._model.id_to_piece(token) if token < self.core_size else ""

    def _model_tokens(self) -> dict[str, str]:
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        ids["unk_token"] = self._model.unk_id()
        return {role: self._model.id_to_piece(i) for role, i in ids.items() if i >= 0}

    def _encode(self, text: str) -> list[int]:
        if self._split is None:
            return self._model.encode(text)
        ids: list[int] = []
        start, strip = 0, False
        for match in self._split.finditer(text):
            token_id, token = self._by_text[match[0]]
            part = text[start : match.start()]
            part = part.lstrip() if strip else part
            ids += self._stretch(part.rstrip() if token.lstrip else part, start)
            ids.append(token_id)
            start, strip = match.end(), token.rstrip
        part = text[start:]
        return ids + self._stretch(part.lstrip() if strip else part, start)

    def _stretch(self, part: str, start: int) -> list[int]:
        """Ids of a part of a text without added tokens, which begins at `start`."""
        return (self._inner if start else self._model).encode(part) if part else []

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else added.content.encode()
        if token >= self.core_size:
            return b""
        model = self._model
        if model.is_control(token) or model.is_unused(token):
            return b""
        if model.is_unknown(token):
            return model.decode([token]).encode()
        piece = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _find(self, content: str) -> int | None:
        """Id of an added token or of a piece."""
        for token_id, token in self._added.items():
            if token.content == content:
                return token_id
        token_id = self._model.piece_to_id(content)
        return token_id if self._model.id_to_piece(token_id) == content else None

    def _find_leading_spaces(self) -> int:
        """Asks the model itself, whose settings the Python package does not show."""
        space = self._model.piece_to_id(SPACE)
        if self._model.is_unknown(space):
            return ALL_SPACES
        remaining = len(self._model.decode([space, space]))
        return {0: ALL_SPACES, 1: 1}.get(remaining, 0)


def serialise_model(
    pieces: Iterable[tuple[str, float, int]],
    trainer: Mapping[int, int | bytes],
    normalizer: Mapping[int, int | bytes],
) -> bytes:
    """A `ModelProto`, as `SentencePieceTokenizer` reads it.

    The classes for it that come with the sentencepiece package work with few versions
    of the protobuf package.

    Args:
      pieces: text, score and type of each (`ModelProto.SentencePiece.Type`).
      trainer: fields of `TrainerSpec` by number.
      normalizer: fields of `NormalizerSpec` by number.
    """
    # Of protocol buffers: 0 is a number, 2 are bytes, 5 is a float.
    text_tag, score_tag, type_tag = _tag(1, 2), _tag(2, 5), _tag(3, 0)
    parts = []
    for text, score, kind in pieces:
        data = text.encode()
        value = struct.pack("<f", score)
        row = (text_tag, _varint(len(data)), data, score_tag, value, type_tag)
        parts.append(_field(1, b"".join((*row, _varint(kind)))))
    for number, fields in ((2, trainer), (3, normalizer)):
        parts.append(_field(number, b"".join(_field(*f) for f in fields.items())))
    return b"".join(parts)


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, bytes):
        return b"".join((_tag(number, 2), _varint(len(value)), value))
    return _tag(number, 0) + _varint(value)


@functools.cache
def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


@functools.cache
def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _processor(data: bytes, source: str):
    import sentencepiece

    try:
        if not data:
            raise RuntimeError("empty")
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise damaged(source, "a sentencepiece model") from None


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _pattern(tokens) -> re.Pattern[str] | None:
    """Matches an added token, the longest that begins at a place."""
    spellings = []
    for token in sorted(tokens, key=lambda t: -len(t.content)):
        spelling = re.escape(token.content)
        spellings.append(rf"(?<!\w){spelling}(?!\w)" if token.single_word else spelling)
    return re.compile("|".join(spellings)) if spellings else None
