"""How often guesses of a kind came true lately: rates by cell, on the device.

A source of guesses sorts them into cells (by the length of a match, by rank, …) and is
told of every guess that could have been right. The rate of a cell is what its guesses
are worth at that moment. A cell begins with its prior, which counts as much as PRIOR
observations, and forgets: no more than MEMORY observations weigh in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

PRIOR = 8.0
MEMORY = 256.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rates:
    """Observations by cell.

    Attributes:
      hits: float32 [cells].
      tries: float32 [cells].
    """

    hits: jax.Array
    tries: jax.Array

    @classmethod
    def start(cls, prior: Sequence[float]) -> Rates:
        """Of a prior rate for each cell."""
        prior = jnp.asarray(prior, jnp.float32)
        return cls(PRIOR * prior, jnp.full_like(prior, PRIOR))

    def log(self, cell: jax.Array) -> jax.Array:
        """float32 log rate of cells (int32, any shape)."""
        return jnp.log(self.hits / self.tries)[cell]

    def after(self, cell: jax.Array, hit: jax.Array, tried: jax.Array) -> Rates:
        """With more observations.

        Args:
          cell: int32, any shape.
          hit: bool, of the same shape: the guess was right.
          tried: bool, likewise: it was a guess at all.
        """
        number = jnp.arange(self.hits.shape[0])
        cell, hit, tried = cell.reshape(-1, 1), hit.reshape(-1, 1), tried.reshape(-1, 1)
        mine = (cell == number) & tried
        hits = self.hits + jnp.sum(mine & hit, axis=0)
        tries = self.tries + jnp.sum(mine, axis=0)
        scale = jnp.minimum(1.0, MEMORY / tries)
        return Rates(hits * scale, tries * scale)
