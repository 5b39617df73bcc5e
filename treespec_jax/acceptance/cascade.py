"""Speculative cascades (Narasimhan et al. 2405.19261): LOSSY against the target.

The policy is a mixture of drafter and target: where the drafter is sure enough, its own
law q stands, and only elsewhere the target's p. A rule that is lossless for p is so for
this policy too, because the policy is a function of p, q and the text before a token,
and never of what is drawn.

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
step's last level is one, so that the law of a text hangs on where its steps began.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.acceptance import families
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class Cascade:
    """One of the deferral rules above.

    Attributes:
      name: of `facts.CASCADES`.
      alpha: see above.
    """

    name: str
    alpha: float

    def scores(self, tree: TokenTree, scores_VBT: jax.Array) -> jax.Array:
        """log pi after every node.

        Args:
          tree: sampled, with its `Proposal`.
          scores_VBT: log p up to a constant per column.
        """
        proposal = tree.proposal
        nodes = jnp.asarray(proposal.nodes)
        own_VBE = scores_VBT[:, :, nodes]
        p_VBE = jax.nn.softmax(own_VBE, axis=0)
        q_VBE = families.drafted(proposal, slice(None), p_VBE.shape[0])
        return scores_VBT.at[:, :, nodes].set(jnp.log(self.mixture(p_VBE, q_VBE)))

    def mixture(self, p: jax.Array, q: jax.Array) -> jax.Array:
        """pi of distributions along the first axis."""
        alpha = self.alpha
        best_p, best_q = jnp.max(p, axis=0), jnp.max(q, axis=0)
        if self.name.startswith("token"):
            defer = {
                "token_v1": lambda: q < best_p - alpha,
                "token_v2": lambda: p < best_p - alpha,
                "token_v3": lambda: p < (1 - alpha) * best_p,
            }[self.name]()
            deferred = jnp.sum(jnp.where(defer, q, 0.0), axis=0)
            return jnp.where(defer, 0.0, q) + p * deferred
        bound = {
            "chow": lambda: 1 - alpha,
            "diff": lambda: best_p - alpha,
            "opt": lambda: best_p - alpha * jnp.sum(jnp.abs(p - q), axis=0) / 2,
        }[self.name]()
        return jnp.where(best_q < bound, p, q)
