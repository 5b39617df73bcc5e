"""One decoder for all model families, and the one forward pass of the program.

Prefill is a chain-shaped tree, plain decoding is a tree of one node, verification is a
tree of T nodes, a drafter's level is W nodes on top of earlier levels. There is no
second attention path for any of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from treespec_jax.config import ModelConfig
from treespec_jax.models.arithmetic import Arithmetic
from treespec_jax.models.layers import Block, RMSNorm, Rows, matrix
from treespec_jax.models.linear import linear, rows_of
from treespec_jax.models.rotary import rotary_angles
from treespec_jax.models.views import CacheView
from treespec_jax.models.weight_types import types_of


@dataclasses.dataclass(frozen=True)
class Forward:
    """One pass over R = B·T rows, B major.

    Attributes:
      hidden: [D, R], of the last layer, before the final norm.
      features: outputs [D, R] of the layers that were asked for.
      kv: per layer the new rows' keys and values [B, K, 2, T, H].
    """

    hidden: jax.Array
    features: tuple[jax.Array, ...]
    kv: tuple[jax.Array, ...]


class Transformer(nnx.Module):
    """Decoder-only transformer: RMSNorm, rotary, grouped queries, gated MLP.

    What Llama, Qwen, Mistral and Gemma add to that is in the configuration; a feature
    that is off leaves no operation behind.

    Args:
      config: the shape.
      dtype: of the activations between operations; norms, rotary angles, softmax and
        accumulation are float32.
      weights: type of the matrices, see `weight_types`; None: that of `dtype`.
      rngs: for random parameters; None: abstract ones (`jax.ShapeDtypeStruct`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        weights: str | None = None,
        rngs: nnx.Rngs | None,
    ):
        self.config, self.arithmetic = config, Arithmetic()
        self.types = types = types_of(dtype, weights)
        table = (config.vocab_size, config.embed_dim)
        axes = ("vocab", "embed")
        self.embedding = matrix(rngs, types, axes, table, config.embed_dim**-0.5)
        self.layers = nnx.List(
            [
                Block(config, types, rngs, local=i in config.local_layers)
                for i in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config, types, rngs, "embed", config.embed_dim)
        if not config.tied_embeddings:
            self.head = matrix(rngs, types, axes, table, config.embed_dim**-0.5)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BU: jax.Array,
        tree_mask_BTU: jax.Array,
        cache: CacheView | None = None,
        scratch: tuple[jax.Array, ...] | None = None,
        feature_layers: tuple[int, ...] = (),
    ) -> Forward:
        """Runs T new rows per slot on top of the cached prefix.

        Never writes the cache (I1); `positions` are prefix length plus depth (I2); the
        prefix is masked by its length alone (I3).

        Args:
          tokens_BT: int32 token ids.
          positions_BU: int32 positions of the U = E + T tree rows: E rows of
            `scratch`, then the new rows themselves.
          tree_mask_BTU: bool, which of the tree rows each new row sees.
          cache: the prefix; None is an empty one.
          scratch: per layer [B, K, 2, E, H], tree rows of earlier calls.
          feature_layers: ascending numbers of layers whose outputs are returned too;
            the number of layers stands for what the final norm makes of the last one.
        """
        cfg = self.config
        tokens_R = tokens_BT.reshape(-1)
        x_DR = self.embed(tokens_R)
        positions_R = positions_BU[:, -tokens_BT.shape[1] :].reshape(-1)
        cos_sin = rotary_angles(cfg.rotary, cfg.head_dim, positions_R)
        local_cos_sin, depth_BU = cos_sin, None
        if cfg.local_layers:
            start_B1 = cache.lengths[:, None] if cache is not None else 0
            depth_BU = positions_BU - start_B1
            if cfg.local_rotary not in (None, cfg.rotary):
                local_cos_sin = rotary_angles(
                    cfg.local_rotary, cfg.head_dim, positions_R
                )
        rows = Rows(cos_sin, tree_mask_BTU, depth_BU)
        local_rows = Rows(local_cos_sin, tree_mask_BTU, depth_BU)
        new, outputs = [], {}
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                x_DR, kv = layer(
                    x_DR,
                    local_rows if i in cfg.local_layers else rows,
                    cache.pages[i] if cache is not None else None,
                    cache,
                    scratch[i] if scratch is not None else None,
                )
            new.append(kv)
            if i in feature_layers:
                outputs[i] = x_DR
        if cfg.num_layers in feature_layers:
            outputs[cfg.num_layers] = self.norm(x_DR)
        return Forward(x_DR, tuple(outputs[i] for i in feature_layers), tuple(new))

    def embed(self, tokens_R: jax.Array) -> jax.Array:
        """What the first layer reads of int32 token ids: [D, R]."""
        x_DR = rows_of(self.embedding[...], tokens_R, self.types.dtype)
        if self.config.scaled_embeddings:
            # Gemma rounds the factor to the dtype of the embedding.
            factor = jnp.asarray(self.config.embed_dim**0.5, x_DR.dtype)
            x_DR = self.arithmetic.rounded(x_DR * factor)
        return x_DR

    def logit_columns(self, hidden_DR: jax.Array) -> jax.Array:
        """float32 logits [V, R] of hidden rows [D, R], a column per token.

        Nothing of this size is transposed on the way from here to the chosen tokens.
        """
        return self.unembed(self.norm(hidden_DR))

    def unembed(self, normed_DR: jax.Array) -> jax.Array:
        """float32 logits [V, R] of rows [D, R] that went through the final norm."""
        with jax.named_scope("head"):
            table = self.embedding if self.config.tied_embeddings else self.head
            logits_VR = linear(table[...], normed_DR, jnp.float32)
            cap = self.config.logit_soft_cap
            return logits_VR if cap is None else cap * jnp.tanh(logits_VR / cap)

    def logits(self, hidden_DR: jax.Array) -> jax.Array:
        """float32 logits [R, V] of hidden rows [D, R]."""
        # Without the barrier a CPU computes the transposed product, slowly.
        return lax.optimization_barrier(self.logit_columns(hidden_DR)).T


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model that `config` describes."""
    model = Transformer(config, rngs=None)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
