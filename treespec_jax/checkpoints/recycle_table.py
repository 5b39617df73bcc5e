"""Successors of tokens that an engine recycled, kept in a file. Light: no jax.

The file is an .npz of two arrays and a text about them. Token ids mean something in one
vocabulary only, so that the file says which one it is of.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from treespec_jax.checkpoints.files import check_writable, read_bytes, write_whole
from treespec_jax.checkpoints.tokenizers import Tokenizer, fingerprint
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

KIND, VERSION = "treespec-jax recycle table", 1
_REMEDY = "name another file"


@dataclasses.dataclass(frozen=True)
class Table:
    """The likeliest successors of every token, best first.

    Attributes:
      best: int32 [V, K].
      logits: float32 [V, K], the target's for those; -inf where nothing is known.
    """

    best: np.ndarray
    logits: np.ndarray

    def resized(self, count: int) -> Table:
        """The same with `count` successors of each token: the best, or some unknown."""
        lacking = (0, 0), (0, max(0, count - self.best.shape[1]))
        best = np.pad(self.best[:, :count], lacking)
        unknown = -np.inf
        logits = np.pad(self.logits[:, :count], lacking, constant_values=unknown)
        return Table(best, logits)


class Model(Protocol):
    """A described or a loaded checkpoint."""

    config: ModelConfig
    tokenizer: Tokenizer | None


class TableFile:
    """A file for the table of one vocabulary.

    Args:
      path: of the file, which need not be there.
      target: the model whose successors they are.
    """

    def __init__(self, path: str | Path, target: Model):
        self.path = Path(path).expanduser()
        self._about = {
            "kind": KIND,
            "version": VERSION,
            "vocab_size": target.config.vocab_size,
            # Without a tokenizer nobody knows what the ids mean.
            "vocabulary": fingerprint(target.tokenizer) if target.tokenizer else "",
        }

    def read(self) -> Table | None:
        """The table; None if there is no file yet.

        Raises:
          UserError: the file cannot be read, is damaged, or is of another vocabulary.
        """
        if not self.path.exists():
            return None
        data = read_bytes(self.path)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                table = Table(arrays["best"], arrays["logits"])
            known = about["kind"] == KIND
        except Exception:  # on damaged bytes zipfile and NumPy raise about anything
            known = False
        if not known:
            raise UserError(
                f"{self.path} is no recycle table, or is damaged; delete it or "
                f"{_REMEDY}"
            )
        self._check(about, table)
        return table

    def write(self, table: Table) -> None:
        """Writes all of the table, or nothing.

        Raises:
          UserError: there is no such folder, or it cannot be written.
        """
        check_writable(self.path, _REMEDY)
        data = io.BytesIO()
        about = np.array(json.dumps(self._about))
        np.savez(data, about=about, best=table.best, logits=table.logits)
        write_whole(self.path, data.getvalue(), _REMEDY)

    def _check(self, about, table: Table) -> None:
        """Raises UserError unless a file's contents fit the target."""
        if about.get("version") != VERSION:
            raise UserError(
                f"{self.path} is a recycle table of version {about.get('version')}, "
                f"this program reads {VERSION}; delete it or {_REMEDY}"
            )
        wanted, found = self._about["vocab_size"], about.get("vocab_size")
        if found != wanted:
            raise UserError(
                f"{self.path} holds successors of {found} tokens, the target has "
                f"{wanted}; {_REMEDY}"
            )
        ours, theirs = self._about["vocabulary"], about.get("vocabulary")
        if ours and theirs and ours != theirs:
            raise UserError(
                f"{self.path} holds successors of another vocabulary than the "
                f"target's; {_REMEDY}"
            )
        best, logits = table.best, table.logits
        sound = best.ndim == 2 and best.shape == logits.shape
        sound = sound and best.shape[0] == wanted and best.shape[1] > 0
        sound = sound and (best.dtype, logits.dtype) == (np.int32, np.float32)
        if not sound or best.min() < 0 or best.max() >= wanted or _spoilt(logits):
            raise UserError(f"{self.path} is damaged; delete it or {_REMEDY}")


def check_output(path: str | Path) -> None:
    """Raises UserError if no table can be written there."""
    check_writable(Path(path).expanduser(), _REMEDY)


def _spoilt(logits: np.ndarray) -> bool:
    return bool(np.isnan(logits).any() or (logits == np.inf).any())
