"""How the children of a node are proposed, whatever the structure of the tree.

Three strategies, `make` chooses one by name (`acceptance.compatibility` says which rule
may judge what):

* `Likeliest`: the best tokens by log q, plus the noise g that the target will use at
  the same position where it is shared, so that guesses lean towards what the target is
  about to choose. The probability that a child is right is estimated as
  softmax((log q + g) / tau).
* `Sampled`: siblings sampled one after the other from q, the drafter's distribution
  under the request's own temperature, top-k, top-p and min-p, and kept in that order.
  Nothing may be dropped, moved or sorted afterwards, or no rule would be lossless.
* `LikeliestOfQ`: the likeliest tokens, with q kept for a cascade.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.sampling import draw, policy
from treespec_jax.sampling.select import top_k

# Best tokens of a node over which its children's probabilities are normalised.
NORMALISED = 8


@dataclasses.dataclass(frozen=True)
class Family:
    """Children of the nodes of a level, best or first sampled first.

    Attributes:
      tokens: int32 [B, W, X].
      log_prob: float32 [B, W, X], of the estimate that a child is right given that its
        parent is; where q is kept, log q. -inf where there is no child.
      log_q: float32 [Vd, B, W], or None; see `trees.token_tree.Proposal`.
      remaining: float32 [B, W, X], or None; the share of q not sampled before a child.
    """

    tokens: jax.Array
    log_prob: jax.Array
    log_q: jax.Array | None = None
    remaining: jax.Array | None = None


class Children(Protocol):
    """A strategy, bound to the step's context.

    Attributes:
      keeps_q: whether families come with `log_q` and `remaining`.
      replacement: whether siblings are sampled independently.
    """

    keeps_q: bool
    replacement: bool

    def propose(
        self, logits_VR: jax.Array, depth: int, number_BWX: jax.Array
    ) -> Family:
        """The X best children of nodes [B, W] at `depth`.

        Args:
          logits_VR: float32, the drafter's after the nodes, R = B·W, B major.
          depth: of the nodes.
          number_BWX: int32, numbers of the tree's nodes by whose uniforms the children
            are sampled.
        """


def make(context: DraftContext, tau: float) -> Children:
    """The strategy of `context.proposal`; asks for the randomness that it needs."""
    name = context.proposal
    if name == "shared":
        return Likeliest(context.sampling, tau, context.randomness.noise_rows())
    if name == "best":
        return Likeliest(context.sampling, tau, None)
    if name == "best_kept":
        return LikeliestOfQ(context.sampling)
    replacement = {"sampled": False, "with_replacement": True}[name]
    return Sampled(context.sampling, context.randomness.proposal(), replacement)


@dataclasses.dataclass(frozen=True)
class Likeliest:
    """The best of log q + g.

    The probability is normalised over the NORMALISED best tokens, not the vocabulary:
    at the usual tau the rest weighs next to nothing, and a sum over it would cost a
    good part of the drafter's pass.
    """

    sampling: policy.Sampling
    tau: float
    noise_CVB: jax.Array | None
    keeps_q = replacement = False

    def propose(self, logits_VR, depth, number_BWX):
        count = number_BWX.shape[2]

        def perturbed():
            if self.noise_CVB is None:
                return policy.truncate(logits_VR, self.sampling)
            noise_VB = self.noise_CVB[depth]
            return policy.perturbed(logits_VR, noise_VB, self.sampling)

        found = lax.cond(
            jnp.all(self.sampling.greedy),
            lambda: _best(logits_VR, count, self.tau),
            lambda: _best(perturbed(), count, self.tau),
        )
        return Family(*(x.reshape(number_BWX.shape) for x in found))


@dataclasses.dataclass(frozen=True)
class LikeliestOfQ:
    """The likeliest tokens of q, which is kept."""

    sampling: policy.Sampling
    keeps_q, replacement = True, False

    def propose(self, logits_VR, depth, number_BWX):
        shape = number_BWX.shape
        log_q_VR = _log_q(logits_VR, self.sampling)
        tokens_RX, log_RX = _best(log_q_VR, shape[2])
        tokens, log_prob = tokens_RX.reshape(shape), log_RX.reshape(shape)
        log_q = log_q_VR.reshape(-1, *shape[:2])
        return Family(tokens, log_prob, log_q, jnp.ones_like(log_prob))


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Samples of q.

    Greedy slots get the likeliest tokens instead, best first: their target is a point
    mass, and every rule then only asks whether a child carries it.
    """

    sampling: policy.Sampling
    uniforms: jax.Array
    replacement: bool
    keeps_q = True

    def propose(self, logits_VR, depth, number_BWX):
        B, W, X = number_BWX.shape
        log_q_VR = _log_q(logits_VR, self.sampling)

        def likeliest():
            tokens_RX, log_RX = _best(logits_VR, X)
            return tokens_RX, log_RX, jnp.ones_like(log_RX)

        def sampled():
            uniforms = self.uniforms[jnp.arange(B)[:, None, None], number_BWX]
            tokens, shares, remaining = draw.siblings(
                log_q_VR, uniforms.reshape(B * W, X, 2), self.replacement
            )
            found = tokens, jnp.log(shares), remaining
            return lax.cond(
                jnp.any(self.sampling.greedy), lambda: mixed(found), lambda: found
            )

        def mixed(found):
            greedy_R1 = jnp.repeat(self.sampling.greedy, W)[:, None]
            pairs = zip(likeliest(), found, strict=True)
            return tuple(jnp.where(greedy_R1, a, b) for a, b in pairs)

        found = lax.cond(jnp.all(self.sampling.greedy), likeliest, sampled)
        tokens, log_prob, remaining = (x.reshape(B, W, X) for x in found)
        return Family(tokens, log_prob, log_q_VR.reshape(-1, B, W), remaining)


def _log_q(logits_VR, sampling):
    """log q [V, R]; of greedy slots at temperature 1 with nothing cut."""
    return policy.distributions(logits_VR, sampling.softened()).log_probabilities()


def _best(scores_VR, count, tau=1.0):
    """The best tokens [R, count] and log softmax of their scores over tau.

    -inf where the policy allows, or the vocabulary holds, fewer tokens.
    """
    seen = min(max(count, NORMALISED), scores_VR.shape[0])
    values_RJ, tokens_RJ = top_k(scores_VR, seen)
    log_RJ = jax.nn.log_softmax(values_RJ / tau, axis=1)
    log_RJ = jnp.where(values_RJ > -jnp.inf, log_RJ, -jnp.inf)
    lacking = (0, 0), (0, max(0, count - seen))
    tokens_RX = jnp.pad(tokens_RJ[:, :count], lacking)
    return tokens_RX, jnp.pad(log_RJ[:, :count], lacking, constant_values=-jnp.inf)
