"""The randomness of one step, for drafter and rule alike."""

from __future__ import annotations

import dataclasses

import jax

from treespec_jax.sampling import streams
from treespec_jax.sampling.noise import Noise
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.streams import Uniforms


class Randomness:
    """Makes what a drafter or a rule asks for, once.

    Rows of noise that the drafter asked for are remembered, so that a rule that asks
    for noise of the same depths reads them. Neither has to know of the other.

    It lives inside the trace of one step. Ask outside of conditionals and loops: what
    is made inside one cannot be read after it.

    Args:
      sampling: settings per slot; seeds above all.
      root_B: int32 [B], absolute positions of the roots.
      nodes: T, of the tree.
      depth: C, of the tree.
      vocab: V.

    Example:
      randomness = Randomness(sampling, lengths, nodes=8, depth=4, vocab=32000)
      rows_CVB = randomness.noise_rows()      # a drafter that shares the noise
      noise_VB = randomness.noise().after(2)  # the exact rule: reads row 2
    """

    def __init__(
        self, sampling: Sampling, root_B: jax.Array, nodes: int, depth: int, vocab: int
    ):
        self._sampling = sampling
        self._root_B = root_B
        self._nodes, self._depth = nodes, depth
        self._noise = Noise(sampling.seed, root_B + 1, vocab)

    def noise(self) -> Noise:
        """Gumbel noise of the positions after the root."""
        return self._noise

    def noise_rows(self) -> jax.Array:
        """The same of depths 0..C-1, float32 [C, V, B]; zeros if all are greedy."""
        if self._noise.rows is None:
            quiet = self._sampling.all_greedy
            self._noise = self._noise.with_rows(self._depth, quiet)
        return self._noise.rows

    def proposal(self) -> jax.Array:
        """Uniforms that each node of a tree is sampled by, float32 [B, T, 2]."""
        return streams.of_proposal(self._sampling.seed, self._root_B, self._nodes)

    def verdict(self) -> Uniforms:
        """Uniforms that a rule decides by."""
        return streams.of_verdict(self._sampling.seed, self._root_B, self._nodes)


@dataclasses.dataclass(frozen=True)
class Given:
    """Randomness that was made before, for tests and measurements.

    Attributes:
      shared: what `noise` returns.
      uniforms: what `proposal` returns.
      decision: what `verdict` returns.
    """

    shared: Noise | None = None
    uniforms: jax.Array | None = None
    decision: Uniforms | None = None

    def noise(self) -> Noise:
        return self.shared

    def noise_rows(self) -> jax.Array:
        return self.shared.rows

    def proposal(self) -> jax.Array:
        return self.uniforms

    def verdict(self) -> Uniforms:
        return self.decision
