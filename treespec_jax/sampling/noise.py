"""Gumbel noise that depends on a request's seed and an absolute position alone.

Plain decoding, every drafter and every tree see the same noise for the token at a
position (common random numbers). It is made row by row, for the positions that somebody
looks at: a row of the vocabulary costs about as much as an exponential of every logit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.branches import branch

# Mean of standard Gumbel noise.
EULER = float(np.euler_gamma)
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("seed", "first", "rows"),
    meta_fields=("vocab",),
)
@dataclasses.dataclass(frozen=True)
class Noise:
    """Of the positions of a step.

    Attributes:
      seed: uint32 [B].
      first: int32 [B], absolute position of the token after depth 0.
      vocab: V, static.
      rows: float32 [n, V, B], of depths 0..n-1; None: each row is made when it is
        asked for.
    """

    seed: jax.Array
    first: jax.Array
    vocab: int
    rows: jax.Array | None = None

    def after(self, depth: jax.Array) -> jax.Array:
        """[V, B], of the token after a depth (int32, one for all slots)."""

        def make():
            return gumbel(self.seed, self.first + depth, self.vocab)

        count = 0 if self.rows is None else self.rows.shape[0]
        if not count:
            return make()
        return lax.cond(
            depth < count,
            lambda: lax.dynamic_index_in_dim(self.rows, depth, keepdims=False),
            make,
        )

    def of(self, tokens: jax.Array, depth: int) -> jax.Array:
        """Of some tokens after a depth, int32 [B, ...], as float32.

        Where a drafter looks at few tokens, rows of the vocabulary need not be made.
        """
        ones = (1,) * (tokens.ndim - 1)
        seed = self.seed.reshape(-1, *ones)
        position = (self.first + depth).reshape(-1, *ones)
        return _gumbel(seed, position, tokens.astype(jnp.uint32))

    def of_nodes(self, depth_BT: jax.Array, most: int) -> jax.Array:
        """[V, B, T], of the token after each node of a tree.

        Args:
          depth_BT: int32, of the nodes.
          most: the greatest depth that may be, static.
        """
        count = 0 if self.rows is None else self.rows.shape[0]
        rows = [] if self.rows is None else [self.rows[: most + 1]]
        if count <= most:
            missing = self.first[:, None] + jnp.arange(count, most + 1, dtype=jnp.int32)
            made_VBC = gumbel(self.seed[:, None], missing, self.vocab)
            rows.append(made_VBC.transpose(2, 0, 1))
        rows_CVB = jnp.concatenate(rows)
        slot_B1 = jnp.arange(depth_BT.shape[0])[:, None]
        return rows_CVB.transpose(1, 2, 0)[:, slot_B1, depth_BT]

    def with_rows(self, count: int, quiet: bool | jax.Array) -> Noise:
        """With rows of the first `count` depths, of zeros if `quiet`: for a drafter."""
        positions_NB = self.first + jnp.arange(count, dtype=jnp.int32)[:, None]

        def make():
            rows = gumbel(self.seed[:, None], positions_NB.T, self.vocab)
            return rows.transpose(2, 0, 1)

        zeros = jnp.zeros((count, self.vocab, self.seed.shape[0]), jnp.float32)
        rows = branch(quiet, lambda: zeros, make)
        return dataclasses.replace(self, rows=rows)


def gumbel(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """float32 [V, ...], independent standard Gumbel for every seed and position.

    Bit for bit `jax.random.gumbel(fold_in(key(seed), position), (V,))` with the
    threefry2x32 generator. Written out it is one loop of a CPU instead of twenty, and
    no setting or release of jax can change the text of a seed.

    Args:
      seed: uint32.
      position: int32, of a shape that the seed's broadcasts to.
      vocab: V.
    """
    ones = (1,) * position.ndim
    token = jnp.arange(vocab, dtype=jnp.uint32).reshape(vocab, *ones)
    return _gumbel(seed, position, token)


def _gumbel(seed, position, token):
    """Noise of tokens (uint32) at positions."""
    key = threefry(_word(0), seed, _word(0), position.astype(jnp.uint32))
    high, low = threefry(*key, _word(0), token)
    # 23 bits as the fraction of a number in [1, 2); never 0, whose logarithm is none.
    fraction = ((high ^ low) >> 9) | _word(0x3F800000)
    uniform = lax.bitcast_convert_type(fraction, jnp.float32) - np.float32(1)
    tiny = jnp.finfo(jnp.float32).tiny
    return -jnp.log(-jnp.log(jnp.maximum(uniform, tiny)))


def threefry(key0, key1, x0, x1):
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) of uint32 arrays."""
    keys = key0, key1, key0 ^ key1 ^ _word(0x1BD11BDA)
    x0, x1 = x0 + key0, x1 + key1
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << _word(bits)) | (x1 >> _word(32 - bits)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + _word(group + 1)
    return x0, x1


def _word(value: int):
    return np.uint32(value)
