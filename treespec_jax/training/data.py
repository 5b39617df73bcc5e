"""Text files to packed rows of tokens, and rows to batches.

A batch is a pure function of the step: the data position of a run is its step alone,
which is what makes resuming exact.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable

import numpy as np

from treespec_jax.errors import UserError
from treespec_jax.training.settings import DataConfig, Source
from treespec_jax.training.vocabulary import BOS, EOS


def read_documents(source: Source) -> list[str]:
    """The documents of a text file, cleaned as `source` says.

    Raises:
      UserError: the file cannot be read, is not UTF-8 or holds no text.
    """
    try:
        with open(source.path, encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        raise UserError(f"cannot read {source.path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{source.path} is not UTF-8 text: {e.reason}") from None
    for pattern, new in source.replace:
        text = re.sub(pattern, new, text)
    if source.lower:
        text = text.lower()
    parts = re.split(source.separator, text) if source.separator else [text]
    documents = [part.strip() for part in parts]
    documents = [d for d in documents if d and len(d) >= source.min_chars]
    if not documents:
        raise UserError(f"{source.path} holds no text")
    return documents


def pack(documents: Iterable[list[int]], row_tokens: int) -> np.ndarray:
    """Packs token lists, each between bos and eos, into rows [rows, row_tokens + 1].

    The last token of a row is the first of the next, so that every token is predicted
    once. What does not fill a row at the end is dropped.
    """
    pieces = [np.array([BOS, *ids, EOS], np.int32) for ids in documents]
    return cut(np.concatenate(pieces), row_tokens)


def cut(stream: np.ndarray, row_tokens: int) -> np.ndarray:
    """Rows [rows, row_tokens + 1] of an array [N], as `pack` has them."""
    rows = max(0, len(stream) - 1) // row_tokens
    starts = np.arange(rows)[:, None] * row_tokens
    return stream[starts + np.arange(row_tokens + 1)]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed text.

    Attributes:
      train: per source, int32 [rows, T + 1].
      weights: per source.
      held_out: int32 [rows, T + 1], the ends of all sources.
      fingerprint: of the training rows.
    """

    train: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    held_out: np.ndarray
    fingerprint: str


def load_rows(config: DataConfig, documents: list[list[str]], encode) -> Rows:
    """Tokenises and packs the documents of each source.

    Args:
      config: gives row length, weights and the held-out share.
      documents: per source, see `read_documents`.
      encode: a list of texts to a list of token lists.

    Raises:
      UserError: a text shorter than two rows, or fewer rows than one batch.
    """
    train, held_out = [], []
    for source, texts in zip(config.sources, documents, strict=True):
        rows = pack(encode(texts), config.row_tokens)
        if len(rows) < 2:
            raise UserError(
                f"{source.path} is too short: {len(rows)} rows of "
                f"{config.row_tokens} tokens, at least 2 are needed"
            )
        count = max(1, round(len(rows) * config.held_out))
        train.append(rows[:-count])
        held_out.append(rows[-count:])
    total = sum(
        round(w.weight * len(r)) for w, r in zip(config.sources, train, strict=True)
    )
    if total < config.batch_rows:
        raise UserError(
            f"data.batch_rows={config.batch_rows} exceeds the {total} rows of "
            f"{config.row_tokens} tokens that the text gives"
        )
    digest = hashlib.sha256()
    for rows in train:
        digest.update(rows.tobytes())
    weights = tuple(source.weight for source in config.sources)
    held = np.concatenate(held_out)
    return Rows(tuple(train), weights, held, digest.hexdigest()[:16])


class Batches:
    """The endless sequence of batches; batch i is the same whenever it is asked for.

    Args:
      rows: packed text.
      batch_rows: rows per batch.
      seed: of the order.
    """

    def __init__(self, rows: Rows, batch_rows: int, seed: int):
        self._rows, self._batch_rows, self._seed = rows, batch_rows, seed
        self._shares = [
            round(weight * len(part))
            for weight, part in zip(rows.weights, rows.train, strict=True)
        ]
        self._epoch = -1

    @property
    def per_epoch(self) -> int:
        """Whole batches of an epoch; its last few rows are left out."""
        return sum(self._shares) // self._batch_rows

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [batch_rows, T + 1] of this step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        chosen = self._order[index * self._batch_rows :][: self._batch_rows]
        return np.stack([self._rows.train[source][row] for source, row in chosen])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """(source, row) pairs of an epoch: each source in its own endless shuffles."""
        pairs = []
        for source, share in enumerate(self._shares):
            size = len(self._rows.train[source])
            turns = np.arange(epoch * share, (epoch + 1) * share)
            picked = np.empty(share, np.int64)
            for lap in np.unique(turns // size):
                order = np.random.default_rng([self._seed, source, int(lap)])
                mine = turns // size == lap
                picked[mine] = order.permutation(size)[turns[mine] % size]
            pairs.append(np.stack([np.full(share, source), picked], axis=1))
        mixed = np.concatenate(pairs)
        # 2**31 keeps this stream apart from those of the sources.
        rng = np.random.default_rng([self._seed, 2**31, epoch])
        return mixed[rng.permutation(len(mixed))]
