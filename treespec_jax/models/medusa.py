"""Medusa heads (Cai et al., 2401.10774): each guesses one more token ahead.

Head k reads the target's last normed row h and scores the token k + 2 places on:
logits_k = U_k (block_L ∘ … ∘ block_1)(h), block(x) = x + silu(W x + b). U_k is a matrix
of the head, or the target's for all of them.

The token after h's row, the root of a tree, is known when the heads guess, but
published heads do not look at it. Heads that do (`MedusaConfig.reads_root`) add R e to
W h of the first block, e being the target's embedding of that token over its root mean
square, as the first head of Hydra sees it (Ankner et al., 2402.05109). They stay
independent of each other, so that one pass still drafts a whole tree.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.drafter_config import MedusaConfig
from treespec_jax.models.eagle import first_ids
from treespec_jax.models.layers import matrix, vector
from treespec_jax.models.linear import linear, rows_of
from treespec_jax.models.weight_types import types_of


class MedusaHeads(nnx.Module):
    """See the module's text.

    Args:
      config: the shape.
      dtype: of activations and biases.
      weights: type of the matrices, see `weight_types`; None: that of `dtype`.
      rngs: for random parameters: blocks begin as the identity; None: abstract ones.

    Attributes:
      token_ids: of the tokens they know, if they are not the target's.
      embedding: the target's, of heads that read the root.
    """

    def __init__(
        self,
        config: MedusaConfig,
        *,
        dtype=jnp.float32,
        weights: str | None = None,
        rngs: nnx.Rngs | None,
    ):
        self.config = config
        self.types = types = types_of(dtype, weights)
        K, L, D = config.heads, config.blocks, config.target_dim
        axes = ("heads", "layers", "embed", "features")
        self.weight = matrix(rngs, types, axes, (K, L, D, D), 0.0)
        self.bias = vector(rngs, types, axes[:3], (K, L, D), 0.0)
        if config.reads_root:
            axes = ("heads", "embed", "features")
            self.root_weight = matrix(rngs, types, axes, (K, D, D), 0.0)
            axes, shape = ("vocab", "embed"), (config.target_vocab, D)
            self.embedding = matrix(rngs, types, axes, shape, D**-0.5)
        axes, shape = ("vocab", "embed"), (config.vocab_size, D)
        if not config.shared_head:
            axes, shape = ("heads", *axes), (K, *shape)
        self.head = matrix(rngs, types, axes, shape, D**-0.5)
        self.token_ids = first_ids(config.vocab_size, rngs) if config.reduced else None

    def rows(self, hidden_DR: jax.Array, tokens_R: jax.Array) -> jax.Array:
        """What each head makes of rows [D, R] before its last matrix: [K, D, R].

        Args:
          hidden_DR: the target's.
          tokens_R: int32, the token after each row's.
        """
        made = []
        e_DR = self._embedded(tokens_R) if self.config.reads_root else None
        for k in range(self.config.heads):
            x_DR = hidden_DR
            for i in range(self.config.blocks):
                y_DR = linear(self.weight[...][k, i], x_DR)
                if i == 0 and e_DR is not None:
                    y_DR = y_DR + linear(self.root_weight[...][k], e_DR)
                x_DR = x_DR + jax.nn.silu(y_DR + self.bias[...][k, i][:, None])
            made.append(x_DR)
        return jnp.stack(made)

    def _embedded(self, tokens_R: jax.Array) -> jax.Array:
        """[D, R], of root mean square 1."""
        e_DR = rows_of(self.embedding[...], tokens_R, jnp.float32)
        scale_1R = jax.lax.rsqrt(jnp.mean(e_DR**2, axis=0, keepdims=True) + 1e-6)
        return (e_DR * scale_1R).astype(self.types.dtype)

    def logit_columns(self, hidden_DR: jax.Array, tokens_R: jax.Array) -> jax.Array:
        """float32 logits [K, Vd, R] of the heads; arguments as of `rows`."""
        x_KDR = self.rows(hidden_DR, tokens_R)
        K, D, R = x_KDR.shape
        with jax.named_scope("heads"):
            if not self.config.shared_head:
                return jnp.stack([self.unembed(x_KDR[k], k) for k in range(K)])
            # One product for all heads: the matrix is read once.
            x_DJ = x_KDR.transpose(1, 0, 2).reshape(D, K * R)
            return self.unembed(x_DJ).reshape(-1, K, R).transpose(1, 0, 2)

    def unembed(self, x_DR: jax.Array, matrix: int = 0) -> jax.Array:
        """float32 logits [Vd, R] by one of the last matrices, or by the shared one."""
        table = self.head[...]
        if not self.config.shared_head:
            table = table[matrix]
        return linear(table, x_DR, jnp.float32)
