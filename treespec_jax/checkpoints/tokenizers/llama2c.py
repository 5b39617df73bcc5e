"""llama2.c's tokenizer files."""

from __future__ import annotations

import heapq
import struct
from pathlib import Path

from treespec_jax.checkpoints.tokenizers.base import BYTE, SPACE, Base, unreadable


class Llama2cTokenizer(Base):
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
            raise unreadable(path, "a llama2.c tokenizer") from None
        self.vocab_size = self.core_size = len(self._pieces)
        self._byte_ids: dict[int, int] = {}
        self._ids: dict[bytes, int] = {}
        for token, data in enumerate(self._pieces):
            match = BYTE.fullmatch(data.decode("utf-8", "replace"))
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
        return text.strip() if token < 3 else text.replace(" ", SPACE)

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
