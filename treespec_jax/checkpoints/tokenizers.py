"""Tokenizers behind one protocol: sentencepiece, tokenizer.json, llama2.c tok.bin."""

from __future__ import annotations

import heapq
import json
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from treespec_jax.checkpoints.streaming import ALL_SPACES, TextStream, decode
from treespec_jax.errors import UserError

__all__ = [
    "HuggingFaceTokenizer",
    "Llama2cTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "same_vocabulary",
]

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      bos_id: token in front of a text, or None.
      eos_ids: tokens that end a text.
      leading_spaces: spaces at the start of a text that decoding drops.
      file_name: name of its file inside a converted checkpoint.
      path: the file that it was read from.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    leading_spaces: int
    file_name: str
    path: Path

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text, after `bos_id` if wanted and there is one."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control tokens leave no trace, broken UTF-8 is U+FFFD."""

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; none for control tokens."""

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's file into a folder."""


class _Base:
    """What the implementations share. `bos_id` and `eos_ids` override the file's."""

    file_name = ""
    leading_spaces = 0

    def __init__(self, path: Path, bos_id: int | None, eos_ids: tuple[int, ...]):
        self.path = Path(path)
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self._known: dict[int, bytes] = {}

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        front = [self.bos_id] if add_bos and self.bos_id is not None else []
        return front + self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return decode(self, ids)

    def token_bytes(self, token: int) -> bytes:
        data = self._known.get(token)
        if data is None:
            self._check(token)
            data = self._known[token] = self._token_bytes(token)
        return data

    def save(self, folder: Path) -> None:
        try:
            shutil.copyfile(self.path, Path(folder) / self.file_name)
        except FileNotFoundError:
            raise UserError(f"tokenizer {self.path} is gone; put it back") from None

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f"token id {token} is outside the tokenizer's {self.vocab_size} pieces"
            )

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError


class SentencePieceTokenizer(_Base):
    """A sentencepiece `.model` file (Kudo & Richardson, 1808.06226).

    Raises:
      UserError: the file is missing or is not a sentencepiece model.
    """

    file_name = "tokenizer.model"

    def __init__(self, path, bos_id=None, eos_ids=()):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise _unreadable(path, "a sentencepiece model") from None
        own_eos = self._model.eos_id()
        if bos_id is None and self._model.bos_id() >= 0:
            bos_id = self._model.bos_id()
        super().__init__(path, bos_id, eos_ids or ((own_eos,) if own_eos >= 0 else ()))
        self.vocab_size = self._model.vocab_size()
        self.leading_spaces = self._find_leading_spaces()

    def piece(self, token: int) -> str:
        self._check(token)
        return self._model.id_to_piece(token)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _token_bytes(self, token: int) -> bytes:
        model = self._model
        if model.is_control(token) or model.is_unused(token):
            return b""
        if model.is_unknown(token):
            return model.decode([token]).encode()
        piece = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def _find_leading_spaces(self) -> int:
        """Asks the model itself, whose settings the Python package does not show."""
        space = self._model.piece_to_id(_SPACE)
        if self._model.is_unknown(space):
            return ALL_SPACES
        kept = len(self._model.decode([space, space]))
        return {0: ALL_SPACES, 1: 1}.get(kept, 0)


class HuggingFaceTokenizer(_Base):
    """A `tokenizer.json` of the tokenizers package.

    The token in front of a text is the one that the file's own post-processor puts
    there; a `tokenizer_config.json` beside it is asked next.

    Raises:
      UserError: the file is missing or damaged, or decodes in a way that has no
        meaning token by token.
    """

    file_name = "tokenizer.json"

    def __init__(self, path, bos_id=None, eos_ids=()):
        import tokenizers

        path = Path(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # the package raises bare Exception
            raise _unreadable(path, "a tokenizer.json") from None
        settings = _read_settings(path.parent / "tokenizer_config.json")
        if bos_id is None:
            front = self._model.encode("").ids
            if front:
                bos_id = front[0]
            elif settings.get("add_bos_token"):
                bos_id = self._model.token_to_id(_content(settings.get("bos_token")))
        if not eos_ids and settings.get("eos_token"):
            eos = self._model.token_to_id(_content(settings["eos_token"]))
            eos_ids = () if eos is None else (eos,)
        super().__init__(path, bos_id, eos_ids)
        self.vocab_size = self._model.get_vocab_size()
        self._added = self._model.get_added_tokens_decoder()
        self._read_decoder()

    def piece(self, token: int) -> str:
        self._check(token)
        return self._model.id_to_token(token) or ""

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _read_decoder(self) -> None:
        """Turns the decoder pipeline into its effect on the bytes of one token."""
        self._byte_level = self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        decoder = self._model.decoder
        for step in _flatten(json.loads(decoder.__getstate__()) if decoder else {}):
            kind = step.get("type")
            if kind == "ByteLevel":
                self._byte_level = True
                self._byte_of = _byte_level_alphabet()
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._replace.append((step["replacement"], " "))
                self.leading_spaces = int(step.get("prepend_scheme") != "never")
            elif kind == "Replace" and "String" in step["pattern"]:
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "Strip" and step["content"] == " " and not step["stop"]:
                self.leading_spaces = step["start"]
            elif kind != "Fuse":
                raise UserError(
                    f"{self.path}: decoder {kind!r} is not supported; ByteLevel, "
                    "Metaspace, ByteFallback, Replace, Strip and Fuse are"
                )

    def _token_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        added = self._added.get(token)
        if added is not None and added.special:
            return b""
        if self._byte_level:
            codes = [self._byte_of.get(char) for char in piece]
            return piece.encode() if None in codes else bytes(codes)
        for old, new in self._replace:
            piece = piece.replace(old, new)
        match = self._byte_fallback and _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.encode()


class Llama2cTokenizer(_Base):
    """A llama2.c `tok.bin`: greedy merges of the best-scored neighbours.

    File: int32 longest piece, then per token float32 score, int32 length, bytes.
    Ids 1 and 2 begin and end a text. A space is put in front of a text; characters
    outside the vocabulary are spelt with the byte tokens `<0xNN>`.

    Raises:
      UserError: the file is missing or cut short.
    """

    file_name = "tokenizer.bin"
    leading_spaces = 1

    def __init__(self, path, bos_id=None, eos_ids=()):
        super().__init__(path, 1 if bos_id is None else bos_id, eos_ids or (2,))
        try:
            self._pieces, self._scores = _read_llama2c(Path(path).read_bytes())
        except (OSError, struct.error, ValueError):
            raise _unreadable(path, "a llama2.c tokenizer") from None
        self.vocab_size = len(self._pieces)
        self._byte_ids: dict[int, int] = {}
        self._ids: dict[bytes, int] = {}
        for token, data in enumerate(self._pieces):
            match = _BYTE.fullmatch(data.decode("utf-8", "replace"))
            if match:
                self._byte_ids[int(match[1], 16)] = token
                self._known[token] = bytes([int(match[1], 16)])
            elif token > 2:
                self._ids.setdefault(data, token)
        # Unknown, begin and end: the last two are spelt with line breaks in the file.
        self._known.update({1: b"", 2: b""})

    def piece(self, token: int) -> str:
        """As sentencepiece spells it: the file holds spaces where that has U+2581."""
        self._check(token)
        text = self._pieces[token].decode("utf-8", "replace")
        return text.strip() if token < 3 else text.replace(" ", _SPACE)

    def _token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        tokens: list[int] = []
        for char in " " + text:
            data = char.encode()
            if data in self._ids:
                tokens.append(self._ids[data])
            else:
                tokens += [self._byte_ids.get(byte, 0) for byte in data]
        return self._merge(tokens)

    def _merge(self, tokens: list[int]) -> list[int]:
        """Joins the best-scored pair, leftmost first, until no pair is a piece.

        A heap over a linked list: n log n for n characters.
        """
        count = len(tokens)
        before = list(range(-1, count - 1))
        after = list(range(1, count + 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = after[left]
            if left < 0 or right >= count:
                return
            pair = self._pieces[tokens[left]] + self._pieces[tokens[right]]
            joined = self._ids.get(pair)
            if joined is not None:
                score = -self._scores[joined]
                heapq.heappush(heap, (score, left, tokens[left], tokens[right], joined))

        for left in range(count - 1):
            offer(left)
        while heap:
            _, left, first, second, joined = heapq.heappop(heap)
            right = after[left]
            if right >= count or (tokens[left], tokens[right]) != (first, second):
                continue
            tokens[left], tokens[right] = joined, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            if before[left] >= 0:
                offer(before[left])
            offer(left)
        return [token for token in tokens if token >= 0]


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
    return _KINDS[path.suffix](path, bos_id, eos_ids)


def same_vocabulary(target: Tokenizer, drafter: Tokenizer) -> None:
    """Checks that two tokenizers give every id the same meaning.

    Raises:
      UserError: names the first piece that differs.
    """
    sizes = target.vocab_size, drafter.vocab_size
    remedy = "speculation needs two models over one vocabulary"
    for token in range(min(sizes)):
        ours, theirs = target.piece(token), drafter.piece(token)
        if ours != theirs:
            raise UserError(
                f"target and drafter have different vocabularies: token {token} is "
                f"{ours!r} in the target and {theirs!r} in the drafter; {remedy}"
            )
    if sizes[0] != sizes[1]:
        larger, name = (
            (target, "target") if sizes[0] > sizes[1] else (drafter, "drafter")
        )
        raise UserError(
            f"target and drafter have different vocabularies: {sizes[0]} and "
            f"{sizes[1]} pieces, token {min(sizes)} {larger.piece(min(sizes))!r} is in "
            f"the {name} only; {remedy}"
        )


def _unreadable(path, what: str) -> UserError:
    if not Path(path).is_file():
        return UserError(f"no tokenizer at {path}; check the path")
    return UserError(f"{path} is not {what}, or is damaged; copy or download it again")


def _read_llama2c(data: bytes) -> tuple[list[bytes], list[float]]:
    """Pieces and scores. Raises ValueError or struct.error for a damaged file."""
    pieces, scores = [], []
    longest = struct.unpack_from("<i", data)[0]
    at = 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8 + length
        if not 0 <= length <= max(longest, 16) or at > len(data):
            raise ValueError("length out of range")
        pieces.append(data[at - length : at])
        scores.append(score)
    if len(pieces) < 3:
        raise ValueError("no tokens")
    return pieces, scores


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _content(token) -> str:
    """A special token's text; older files hold it as a dictionary."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _flatten(step: dict) -> list[dict]:
    if step.get("type") == "Sequence":
        return [leaf for inner in step["decoders"] for leaf in _flatten(inner)]
    return [step] if step else []


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, by character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = printable + [256 + i for i in range(len(others))]
    pairs = zip(codes, printable + others, strict=True)
    return {chr(code): byte for code, byte in pairs}
