"""Medusa heads (Cai et al., 2401.10774): each guesses one more token ahead.

Head k reads the target's last normed row h and scores the token k + 2 places on:
logits_k = U_k (block_L ∘ … ∘ block_1)(h), block(x) = x + silu(W x + b). U_k is a matrix
of the head, or the target's for all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.drafter_config import MedusaConfig
from treespec_jax.models.eagle import first_ids
from treespec_jax.models.layers import param
from treespec_jax.models.linear import linear


class MedusaHeads(nnx.Module):
    """See the module's text.

    Args:
      config: the shape.
      dtype: of the parameters.
      rngs: for random parameters: blocks begin as the identity; None: abstract ones.

    Attributes:
      token_ids: of the tokens they know, if they are not the target's.
    """

    def __init__(
        self, config: MedusaConfig, *, dtype=jnp.float32, rngs: nnx.Rngs | None
    ):
        self.config = config
        K, L, D = config.heads, config.blocks, config.target_dim
        axes = ("heads", "layers", "embed", "features")
        self.weight = param(rngs, dtype, axes, (K, L, D, D), fill=0.0)
        self.bias = param(rngs, dtype, axes[:3], (K, L, D), fill=0.0)
        axes, shape = ("vocab", "embed"), (config.vocab_size, D)
        if not config.shared_head:
            axes, shape = ("heads", *axes), (K, *shape)
        self.head = param(rngs, dtype, axes, shape, D**-0.5)
        self.token_ids = first_ids(config.vocab_size, rngs) if config.reduced else None

    def rows(self, hidden_DR: jax.Array) -> jax.Array:
        """What each head makes of rows [D, R] before its last matrix: [K, D, R]."""
        made = []
        for k in range(self.config.heads):
            x_DR = hidden_DR
            for i in range(self.config.blocks):
                y_DR = linear(self.weight[...][k, i], x_DR)
                x_DR = x_DR + jax.nn.silu(y_DR + self.bias[...][k, i][:, None])
            made.append(x_DR)
        return jnp.stack(made)

    def logit_columns(self, hidden_DR: jax.Array) -> jax.Array:
        """float32 logits [K, Vd, R] of the heads for rows [D, R]."""
        x_KDR = self.rows(hidden_DR)
        K, D, R = x_KDR.shape
        with jax.named_scope("heads"):
            if not self.config.shared_head:
                pairs = zip(
                    jnp.unstack(self.head[...]), jnp.unstack(x_KDR), strict=True
                )
                return jnp.stack([linear(u, x, jnp.float32) for u, x in pairs])
            # One product for all heads: the matrix is read once.
            x_DJ = x_KDR.transpose(1, 0, 2).reshape(D, K * R)
            return self.unembed(x_DJ).reshape(-1, K, R).transpose(1, 0, 2)

    def unembed(self, x_DR: jax.Array, matrix: int = 0) -> jax.Array:
        """float32 logits [Vd, R] by one of the last matrices, or by the shared one."""
        table = self.head[...]
        if not self.config.shared_head:
            table = table[matrix]
        return linear(table, x_DR, jnp.float32)
