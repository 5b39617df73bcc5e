"""Rows for a drafter's training, and the batches of a run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.errors import UserError
from treespec_jax.training.answers import (
    Answers,
    MaskedRows,
    join,
    read_answers,
    read_texts,
)
from treespec_jax.training.drafter_settings import AnswersConfig
from treespec_jax.training.settings import Source


def read(config: AnswersConfig, target: LoadedModel) -> Answers:
    """All texts that the configuration names.

    Raises:
      UserError: a folder or file that cannot be read, or no tokenizer to read it with.
    """
    parts = [read_answers(folder) for folder in config.answers]
    if config.text:
        sources = [Source(path, separator=config.separator) for path in config.text]
        parts.append(read_texts(sources, tokenizer_of(target)))
    return join(parts)


def tokenizer_of(target: LoadedModel) -> Tokenizer:
    """The target's tokenizer; Raises UserError: it has none."""
    if target.tokenizer is None:
        raise UserError(
            f"{target.source} has no tokenizer to read texts with; give --data=FOLDER "
            "of generate_answers"
        )
    return target.tokenizer


def load(
    config: AnswersConfig, target: LoadedModel, answers: Answers | None = None
) -> tuple[MaskedRows, MaskedRows]:
    """Rows to train on, and rows that are held out.

    Args:
      config: how the texts are cut.
      target: that the drafter is for.
      answers: None: what `config` names.

    Raises:
      UserError: as `read`; tokens that the target lacks, rows longer than its
        positions, or fewer rows than a batch has.
    """
    longest = target.config.max_positions
    if config.row_tokens > longest:
        raise UserError(
            f"data.row_tokens={config.row_tokens} exceeds the target's {longest} "
            "positions; lower it"
        )
    if answers is None:
        answers = read(config, target)
    largest, vocab = int(answers.tokens.max()), target.config.vocab_size
    if largest >= vocab:
        raise UserError(
            f"token {largest} of the answers is outside the target's {vocab}; they are "
            "another model's"
        )
    rows, held_out = answers.rows(config.row_tokens, config.held_out, config.seed)
    if len(rows.tokens) < config.batch_rows:
        raise UserError(
            f"data.batch_rows={config.batch_rows} exceeds the {len(rows.tokens)} rows "
            f"of {config.row_tokens} tokens that the answers give; lower it"
        )
    return rows, held_out


def fingerprint(rows: MaskedRows) -> str:
    """Of all tokens."""
    return hashlib.sha256(rows.tokens.tobytes()).hexdigest()[:16]


def take(rows: MaskedRows, which: np.ndarray) -> MaskedRows:
    """Some of the rows."""
    return MaskedRows(rows.tokens[which], rows.written[which])


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of batches; batch i is the same whenever it is asked for.

    Attributes:
      rows: to choose from.
      batch_rows: of a batch.
      seed: of the order.
    """

    rows: MaskedRows
    batch_rows: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Whole batches of an epoch; its last few rows are left out."""
        return len(self.rows.tokens) // self.batch_rows

    def __getitem__(self, step: int) -> MaskedRows:
        epoch, index = divmod(step, self.per_epoch)
        order = _order(self.seed, epoch, len(self.rows.tokens))
        return take(self.rows, order[index * self.batch_rows :][: self.batch_rows])


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
