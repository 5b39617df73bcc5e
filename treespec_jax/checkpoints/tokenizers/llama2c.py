"""llama2.c's tokenizer files."""

from __future__ import annotations

import heapq
import struct

from treespec_jax.checkpoints.tokenizers.base import BYTE, SPACE, Tokenizer, damaged
from treespec_jax.checkpoints.tokenizers.settings import TokenizerSettings


class Llama2cTokenizer(Tokenizer):
    """A llama2.c `tok.bin`: greedy merges of the best-scored neighbours.

    File: int32 longest piece, then per token float32 score, int32 length, bytes.
    Ids 1 and 2 begin and end a text. A space is put in front of a text; characters
    outside the vocabulary are spelt with the byte tokens `<0xNN>`.

    Args:
      data: contents of such a file.
      settings: only its `source`, `bos_id`, `eos_ids`, `template` and the
        template's `named` tokens count.

    Raises:
      UserError: the data is cut short.
    """

    file_name = "tokenizer.bin"
    leading_spaces = 1

    def __init__(self, data: bytes, settings: TokenizerSettings):
        bos_id = 1 if settings.bos_id is None else settings.bos_id
        super().__init__(data, settings, bos_id, settings.eos_ids or (2,))
        try:
            self._pieces, self._scores = _parse(data)
        except (struct.error, ValueError):
            raise damaged(self.source, "a llama2.c tokenizer") from None
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

        def offer(index: int) -> None:
            follower = after[index]
            if index < 0 or follower >= count:
                return
            first, second = tokens[index], tokens[follower]
            joined = self._ids.get(self._pieces[first] + self._pieces[second])
            if joined is not None:
                entry = (-self._scores[joined], index, first, second, joined)
                heapq.heappush(heap, entry)

        for index in range(count - 1):
            offer(index)
        while heap:
            _, index, first, second, joined = heapq.heappop(heap)
            follower = after[index]
            if (
                follower >= count
                or tokens[index] != first
                or tokens[follower] != second
            ):
                continue
            tokens[index], tokens[follower] = joined, -1
            after[index] = after[follower]
            if after[index] < count:
                before[after[index]] = index
            if before[index] >= 0:
                offer(before[index])
            offer(index)
        return [token for token in tokens if token >= 0]


def _parse(data: bytes) -> tuple[list[bytes], list[float]]:
    """Pieces and scores. Raises ValueError or struct.error for damaged data."""
    pieces, scores = [], []
    longest = struct.unpack_from("<i", data)[0]
    offset = 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8 + length
        if not 0 <= length <= max(longest, 16) or offset > len(data):
            raise ValueError("length out of range")
        pieces.append(data[offset - length : offset])
        scores.append(score)
    if len(pieces) < 3:
        raise ValueError("no tokens")
    return pieces, scores
