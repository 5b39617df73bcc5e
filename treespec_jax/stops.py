"""The text of one request as its tokens come, and where a stop text begins in it."""

from __future__ import annotations

from collections.abc import Sequence

from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer


class StoppedText:
    """A text that ends where the first stop text begins.

    A control token leaves no trace in the text. A stop text that contains the spelling
    of one ("<|im_end|>") is found where the token itself was emitted, alone or with the
    text around it.

    Args:
      tokenizer: of the tokens.
      context: tokens that the text goes on from.
      stops: texts that end it.
      included: whether the one that is found stays part of the text.

    Attributes:
      stopped: whether a stop text was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        stops: Sequence[str],
        included: bool = False,
    ):
        self.stopped = False
        self._included = included
        self._ended = False
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, context)
        self._stops = tuple(stops)
        self._shown = _Watched(self._stops)
        # The same text with control tokens spelt out. Only stop texts that contain one
        # of them are looked for in it: "end" is not found inside "<|im_end|>".
        self._spelt = _Watched(())
        self._spellings: list[tuple[int, int]] = []

    @property
    def text(self) -> str:
        """Of the tokens so far, up to the first stop text, or through it."""
        return self._shown.text

    def push(self, token: int, early: bool = False) -> None:
        """Takes the next token; an early one completes no stop text."""
        self._append(self._stream.push([token]), early=early)
        spelling = "" if self.stopped else self._spelling(token)
        if spelling:
            self._spelt.stops |= {stop for stop in self._stops if spelling in stop}
            self._spellings.append((len(self._spelt.text), len(spelling)))
            self._append("", spelling, early)

    def end(self) -> None:
        """No more tokens come: marks a character that stayed incomplete."""
        if not self._ended and not self.stopped:
            self._append(self._stream.flush())
        self._ended = True

    def certain(self) -> int:
        """Length of the part of the text that no stop text can still take back."""
        if self._ended or self.stopped:
            return len(self.text)
        shown = len(self._shown.text) - self._shown.overlap()
        spelt = len(self._spelt.text) - self._spelt.overlap()
        return min(shown, self._without_spellings(spelt))

    def _append(self, piece: str, spelling: str = "", early: bool = False) -> None:
        found = self._shown.append(piece)
        spelt = self._spelt.append(piece + spelling)
        found += [(self._without_spellings(begin), stop) for begin, stop in spelt]
        if found and not early:
            # Of those that begin together, the one that was completed first.
            begin, stop = min(found, key=lambda pair: (pair[0], len(pair[1])))
            end = stop if self._included else ""
            self._shown.text = self._shown.text[:begin] + end
            self.stopped = True

    def _without_spellings(self, length: int) -> int:
        """Length in the text of the first `length` characters of the spelt one."""
        spelt = (min(max(length - start, 0), size) for start, size in self._spellings)
        return length - sum(spelt)

    def _spelling(self, token: int) -> str:
        """How a control token is spelt in some stop text; "" if it is in none."""
        tokenizer = self._tokenizer
        if not self._stops or tokenizer.token_bytes(token):
            return ""
        # An embedding may be padded with rows that stand for no token.
        spelling = tokenizer.piece(token) if token < tokenizer.vocab_size else ""
        return spelling if any(spelling in stop for stop in self._stops) else ""


class _Watched:
    """A growing text, and the texts that are looked for in it."""

    def __init__(self, stops: Sequence[str]):
        self.text = ""
        self.stops = set(stops)

    def append(self, piece: str) -> list[tuple[int, str]]:
        """Adds a piece; returns where stop texts begin that end in it, and those."""
        longest = max(map(len, self.stops), default=0)
        begin = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [(self.text.find(stop, begin), stop) for stop in self.stops]
        return [(start, stop) for start, stop in found if start >= 0]

    def overlap(self) -> int:
        """Length of the longest end of the text that a stop text could begin with."""
        return max((_overlap(self.text, stop) for stop in self.stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
