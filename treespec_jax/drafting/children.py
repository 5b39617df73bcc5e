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

A drafter's temperature may follow the tree (`Tempered`).

A drafter that scores few tokens (`protocol.Guesses`) has estimates already: they order
the children of greedy slots as they are, and the noise is made for these tokens alone.
Where q is kept, it is the guesses and the rest of the probability spread evenly.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from treespec_jax.branches import branch
from treespec_jax.drafting.protocol import DraftContext, Guesses, Scores
from treespec_jax.sampling import draw, policy
from treespec_jax.sampling.noise import EULER
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.sampling.select import top_k, top_k_rows
from treespec_jax.sampling.temperature import Adaptive

# Best tokens of a node over which its children's probabilities are normalised.
NORMALISED = 8
# Probability that guesses leave over at least, for all other tokens together.
REST = 1e-4


@dataclasses.dataclass(frozen=True)
class Family:
    """Children of the nodes of a level, best or first sampled first.

    Attributes:
      tokens: int32 [B, W, X].
      log_prob: float32 [B, W, X], of the estimate that a child is right given that its
        parent is; where q is kept, log q. -inf where there is no child.
      log_q: float32 [Vd, B, W], or None; see `trees.token_tree.Proposal`.
      remaining: float32 [B, W, X], or None; the share of q not sampled before a child.
      source: int32 [B, W, X], or None; see `TokenTree.source`.
    """

    tokens: jax.Array
    log_prob: jax.Array
    log_q: jax.Array | None = None
    remaining: jax.Array | None = None
    source: jax.Array | None = None


class Children(Protocol):
    """A strategy, bound to the step's context.

    Attributes:
      keeps_q: whether families come with `log_q` and `remaining`.
      replacement: whether siblings are sampled independently.
    """

    keeps_q: bool
    replacement: bool

    def propose(self, scores: Scores, depth: int, number_BWX: jax.Array) -> Family:
        """The X best children of nodes [B, W] at `depth`.

        Args:
          scores: the drafter's after the nodes.
          depth: of the nodes.
          number_BWX: int32, numbers of the tree's nodes by whose uniforms the children
            are sampled.
        """


def make(context: DraftContext, tau: float) -> Children:
    """The strategy of `context.proposal`; asks for the randomness that it needs."""
    children = _make(context, tau)
    if context.temperature is not None:
        # Greedy slots have no temperature.
        sampled_B = ~context.sampling.greedy
        adaptive = Adaptive.of_all(context.temperature, sampled_B)
        children = Tempered(children, adaptive)
    if context.adaptive is not None:
        # The drafter takes after the policy, which comes first.
        children = Tempered(children, context.adaptive)
    return children


def _make(context: DraftContext, tau: float) -> Children:
    name, sampling = context.proposal, context.sampling
    if name == "shared":
        return Likeliest(sampling, tau, context.randomness)
    if name == "best":
        return Likeliest(sampling, tau, None)
    if name == "best_kept":
        return LikeliestOfQ(sampling, context.vocab)
    replacement = {"sampled": False, "with_replacement": True}[name]
    uniforms = context.randomness.proposal()
    return Sampled(sampling, context.vocab, uniforms, replacement)


def breadth(scores: Scores) -> int:
    """Children that a node can have at most."""
    if isinstance(scores, Guesses):
        return scores.tokens.shape[2]
    return scores.shape[0]


@dataclasses.dataclass(frozen=True)
class Likeliest:
    """The best of log q + g.

    The probability is normalised over the NORMALISED best tokens, not the vocabulary:
    at the usual tau the rest weighs next to nothing, and a sum over it would cost a
    good part of the drafter's pass. Guesses are not all of q: what they leave over
    competes as one more token, of the mean of the noise.
    """

    sampling: policy.Sampling
    tau: float
    randomness: Randomness | None
    keeps_q = replacement = False

    def propose(self, scores, depth, number_BWX):
        if isinstance(scores, Guesses):
            return self._of_guesses(scores, depth, number_BWX.shape[2])
        count = number_BWX.shape[2]
        rows_CVB = None
        if self.randomness is not None:
            rows_CVB = self.randomness.noise_rows()

        def perturbed():
            if rows_CVB is None:
                return policy.truncate(scores, self.sampling)
            return policy.perturbed(scores, rows_CVB[depth], self.sampling)

        found = branch(
            self.sampling.all_greedy,
            lambda: _best(scores, count, self.tau),
            lambda: _best(perturbed(), count, self.tau),
        )
        return Family(*(x.reshape(number_BWX.shape) for x in found))

    def _of_guesses(self, guesses: Guesses, depth: int, count: int) -> Family:
        log_BWK = guesses.log_prob
        if self.randomness is not None:
            noise = self.randomness.noise()
            log_BWK = branch(
                self.sampling.all_greedy,
                lambda: log_BWK,
                lambda: self._leaning(guesses, noise.of(guesses.tokens, depth)),
            )
        K = log_BWK.shape[2]
        log_BWX, number = top_k_rows(log_BWK, min(count, K))
        lacking = (0, 0), (0, 0), (0, max(0, count - K))

        def chosen(x_BWK):
            return jnp.pad(jnp.take_along_axis(x_BWK, number, axis=2), lacking)

        return Family(
            tokens=chosen(guesses.tokens),
            log_prob=jnp.pad(log_BWX, lacking, constant_values=-jnp.inf),
            source=chosen(guesses.source),
        )

    def _leaning(self, guesses: Guesses, noise_BWK):
        """Estimates [B, W, K] once the noise of the position is known."""
        log_BWK = guesses.log_prob
        rest_BW1 = 1.0 - jnp.sum(jnp.exp(log_BWK), axis=2, keepdims=True)
        rest_BW1 = jnp.log(jnp.maximum(rest_BW1, REST)) + EULER
        scores_BWJ = jnp.concatenate([log_BWK + noise_BWK, rest_BW1], axis=2)
        leaning_BWJ = jax.nn.log_softmax(scores_BWJ / self.tau, axis=2)
        greedy_B11 = self.sampling.greedy[:, None, None]
        return jnp.where(greedy_B11, log_BWK, leaning_BWJ[:, :, :-1])


@dataclasses.dataclass(frozen=True)
class LikeliestOfQ:
    """The likeliest tokens of q, which is kept."""

    sampling: policy.Sampling
    vocab: int
    keeps_q, replacement = True, False

    def propose(self, scores, depth, number_BWX):
        shape = number_BWX.shape
        log_q_VR = _log_q(_dense(scores, self.vocab), self.sampling)
        tokens_RX, log_RX = _best(log_q_VR, shape[2])
        tokens, log_prob = tokens_RX.reshape(shape), log_RX.reshape(shape)
        return Family(
            tokens=tokens,
            log_prob=log_prob,
            log_q=log_q_VR.reshape(-1, *shape[:2]),
            remaining=jnp.ones_like(log_prob),
            source=_source(scores, tokens),
        )


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Samples of q.

    Greedy slots get the likeliest tokens instead, best first: their target is a point
    mass, and every rule then only asks whether a child carries it.
    """

    sampling: policy.Sampling
    vocab: int
    uniforms: jax.Array
    replacement: bool
    keeps_q = True

    def propose(self, scores, depth, number_BWX):
        B, W, X = number_BWX.shape
        logits_VR = _dense(scores, self.vocab)
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
            return branch(self.sampling.any_greedy, lambda: mixed(found), lambda: found)

        def mixed(found):
            greedy_R1 = jnp.repeat(self.sampling.greedy, W)[:, None]
            pairs = zip(likeliest(), found, strict=True)
            return tuple(jnp.where(greedy_R1, a, b) for a, b in pairs)

        found = branch(self.sampling.all_greedy, likeliest, sampled)
        tokens, log_prob, remaining = (x.reshape(B, W, X) for x in found)
        log_q_VBW, source = log_q_VR.reshape(-1, B, W), _source(scores, tokens)
        return Family(tokens, log_prob, log_q_VBW, remaining, source)


@dataclasses.dataclass(frozen=True)
class Tempered:
    """Another strategy at temperatures that follow the tree.

    The strategy samples from and keeps one q, which is that of the changed logits, so
    that a rule compares with the distribution that was sampled from. A node's factor
    hangs on its path alone. Guesses stay as they are.
    """

    inner: Children
    adaptive: Adaptive

    @property
    def keeps_q(self) -> bool:
        return self.inner.keeps_q

    @property
    def replacement(self) -> bool:
        return self.inner.replacement

    def propose(self, scores, depth, number_BWX):
        if not isinstance(scores, Guesses):
            depth_BW = jnp.full(number_BWX.shape[:2], depth)
            # As many as the nodes of a level have at most.
            children_BW = jnp.full(number_BWX.shape[:2], number_BWX.shape[2])
            scores = self.adaptive.temper(scores, depth_BW, children_BW)
        return self.inner.propose(scores, depth, number_BWX)


def _dense(scores: Scores, vocab: int) -> jax.Array:
    """Logits [V, R] of any scores."""
    if not isinstance(scores, Guesses):
        return scores
    B, W, K = scores.tokens.shape
    log_BWK = jnp.where(scores.log_prob > -jnp.inf, scores.log_prob, 0.0)
    prob_BWK = jnp.where(scores.log_prob > -jnp.inf, jnp.exp(log_BWK), 0.0)
    rest_BW = jnp.maximum(1.0 - jnp.sum(prob_BWK, axis=2), REST) / vocab
    column_R1 = jnp.arange(B * W)[:, None]
    prob_VR = jnp.broadcast_to(rest_BW.reshape(-1), (vocab, B * W))
    tokens, more = scores.tokens.reshape(B * W, K), prob_BWK.reshape(B * W, K)
    return jnp.log(prob_VR.at[tokens, column_R1].add(more, mode="drop"))


def _source(scores: Scores, tokens_BWX):
    """Where the tokens come from; None if the drafter has one source."""
    if not isinstance(scores, Guesses):
        return None
    same = tokens_BWX[:, :, :, None] == scores.tokens[:, :, None]
    same &= (scores.log_prob > -jnp.inf)[:, :, None]
    return jnp.max(jnp.where(same, scores.source[:, :, None], 0), axis=3)


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
