"""Where randomness comes from: counters of (seed, position, stream), nothing else.

Equal seeds give equal samples whatever the batch, the slot or the neighbours. Streams
never meet: proposals, acceptance and the last token of a step must be independent of
each other, or the output is biased. Each stream is keyed by the position of the step's
*root*. A position may be drafted in several steps, by uniforms that a rule has looked
at and rejected (block and traversal decide by tokens further down); only the root's
position is new in every step.

The shared noise of the exact rule (`noise.gumbel`) is a stream of its own: its
keys fold in a position, those here a number that no position reaches.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PROPOSAL, ACCEPT, LAST = (np.uint32(2**32 - 1 - n) for n in range(3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniforms:
    """What a sampling rule decides by, all in [0, 1) and independent.

    Attributes:
      accept: float32 [B, T], one per node.
      last: float32 [B, 2], for the token after the accepted path (`draw.one`).
    """

    accept: jax.Array
    last: jax.Array


def uniforms(seed_B, position_B, stream, shape) -> jax.Array:
    """float32 [B, *shape] in [0, 1) of one stream.

    Args:
      seed_B: uint32, of the requests.
      position_B: int32, absolute positions of the roots.
      stream: PROPOSAL, ACCEPT or LAST.
      shape: of a slot's uniforms.
    """

    def draw(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
        return jax.random.uniform(jax.random.fold_in(key, position), shape, jnp.float32)

    return jax.vmap(draw)(seed_B, position_B)


def of_proposal(seed_B, position_B, nodes: int) -> jax.Array:
    """float32 [B, T, 2]: what each node of a sampled tree is drawn by."""
    return uniforms(seed_B, position_B, PROPOSAL, (nodes, 2))


def of_verdict(seed_B, position_B, nodes: int) -> Uniforms:
    """What a rule decides by."""
    return Uniforms(
        accept=uniforms(seed_B, position_B, ACCEPT, (nodes,)),
        last=uniforms(seed_B, position_B, LAST, (2,)),
    )
