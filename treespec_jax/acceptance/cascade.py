"""Speculative cascades (Narasimhan et al. 2405.19261): LOSSY against the target.

The policy is a mixture of drafter and target: where the drafter is sure enough, its own
distribution q stands, and only elsewhere the target's p. A rule that is lossless for p
is so for this policy too, because the policy is a function of p, q and the text before
a token, and never of what is drawn.

At a node that the drafter expanded, with r in {0, 1} ("defer to the target"):

* chow: pi = (1 - r) q + r p, r = [max q < 1 - alpha];
* diff: the same with r = [max q < max p - alpha];
* opt: r = [max q < max p - alpha TV(p, q)], TV = sum |p - q| / 2;
* token_v1 to token_v3 decide by token, pi(v) = q(v) (1 - r(v)) + p(v) sum r q, with
  r(v) = [q(v) < max p - alpha], [p(v) < max p - alpha], [p(v) < (1 - alpha) max p].

So alpha is: for chow the doubt in q that is put up with; for diff how much surer than
the drafter the target has to be, for opt the same per unit of their distance; for
token_v1 how far below p's maximum a token's q, for token_v2 its p may lie for q's word
on it to be taken, for token_v3 that relative to the maximum.

At a node without q, one that the drafter did not expand, pi = p. Every token after a
step's last level is one, so that the distribution of a text hangs on where its steps
began.

Greedy requests: who has the word, r, is decided by p and q at temperature 1 with
nothing cut, and a token that would be drawn is the likeliest instead: argmax p where r,
else argmax q; a rule by token asks r of v = argmax q. (With temperatures near 0 inside
r both maxima would be 1, and no rule would ever defer.) That is one token per node, a
policy like any other; token_v3 with alpha 0 is the target's own greedy text.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance import families
from treespec_jax.branches import on_gpu
from treespec_jax.sampling import select
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class Cascade:
    """One of the deferral rules above.

    Attributes:
      name: of `compatibility.CASCADES`.
      alpha: see above.
    """

    name: str
    alpha: float

    def scores(
        self, tree: TokenTree, scores_VBT: jax.Array, greedy_B: jax.Array
    ) -> jax.Array:
        """log pi after every node.

        Args:
          tree: with its `Proposal`.
          scores_VBT: log p up to a constant per column; of greedy slots at temperature
            1 (`Sampling.softened`).
          greedy_B: bool; these slots get 0 for one token and -inf for the others, at
            nodes that have q.
        """
        proposal = tree.proposal
        nodes = jnp.asarray(proposal.nodes)
        p_VBE = jax.nn.softmax(scores_VBT[:, :, nodes], axis=0)
        vocab = p_VBE.shape[0]
        q_VBE = families.drafted(proposal, slice(None), vocab)
        mixture = self.mixture(p_VBE, q_VBE)

        def with_points():
            token_V11 = jnp.arange(vocab, dtype=jnp.int32)[:, None, None]
            point = (token_V11 == self.choice(p_VBE, q_VBE)).astype(mixture.dtype)
            return jnp.where(greedy_B[:, None], point, mixture)

        pi_VBE = on_gpu(
            with_points,
            lambda: lax.cond(jnp.any(greedy_B), with_points, lambda: mixture),
        )
        return scores_VBT.at[:, :, nodes].set(jnp.log(pi_VBE))

    def mixture(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """pi of distributions along the first axis."""
        defer = self._defer(p, q)
        if defer.ndim < p.ndim:
            return jnp.where(defer, p, q)
        deferred = jnp.sum(jnp.where(defer, q, 0.0), axis=0)
        return jnp.where(defer, 0.0, q) + p * deferred

    def choice(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """int32, the token of a greedy request, of distributions [V, B, E]."""
        of_p, of_q = (select.argmax(x.reshape(len(x), -1)) for x in (p, q))
        of_p, of_q = of_p.reshape(p.shape[1:]), of_q.reshape(q.shape[1:])
        defer = self._defer(p, q)
        if defer.ndim == p.ndim:
            defer = jnp.take_along_axis(defer, of_q[None], axis=0)[0]
        return jnp.where(defer, of_p, of_q)

    def _defer(self, p, q):
        """r: of every token, or of all of them at once."""
        alpha = self.alpha
        best_p, best_q = jnp.max(p, axis=0), jnp.max(q, axis=0)
        return {
            "chow": lambda: best_q < 1 - alpha,
            "diff": lambda: best_q < best_p - alpha,
            "opt": lambda: (
                best_q < best_p - alpha * jnp.sum(jnp.abs(p - q), axis=0) / 2
            ),
            "token_v1": lambda: q < best_p - alpha,
            "token_v2": lambda: p < best_p - alpha,
            "token_v3": lambda: p < (1 - alpha) * best_p,
        }[self.name]()
