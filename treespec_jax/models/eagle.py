"""EAGLE's drafter: one decoder layer that continues the target's hidden rows.

Row i pairs what the target computed at position i with the token that follows there:
the row after it, and the token after that, are what the layer predicts. Below a drafted
token its own output stands in for the target's row.

| | generation 1 (and 2) | generation 3 |
|---|---|---|
| feature f | the normed last row | rows of three layers, fused: h = fc(f) |
| attends over | x = fc([e; f]) | [norm(e); norm(h)] |
| residual | x | h |
| next feature | the output | the output |
| head | the target's, on the output | on norm(output) |

Sources: 2401.15077, 2406.16858, 2503.01840.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.drafter_config import EagleConfig
from treespec_jax.models.layers import (
    Attention,
    GatedMLP,
    RMSNorm,
    Rows,
    matrix,
    vector,
)
from treespec_jax.models.linear import linear, rows_of
from treespec_jax.models.rotary import rotary_angles
from treespec_jax.models.transformer import Forward
from treespec_jax.models.views import CacheView
from treespec_jax.models.weight_types import types_of


class TokenIds(nnx.Variable):
    """int32 [Vd], the target's number of each token that a drafter knows."""


def first_ids(count: int, rngs: nnx.Rngs | None) -> TokenIds:
    """Of the first tokens, to be replaced; abstract without `rngs`."""
    if rngs is None:
        return TokenIds(jax.ShapeDtypeStruct((count,), jnp.int32))
    return TokenIds(jnp.arange(count, dtype=jnp.int32))


def spread(logits: jax.Array, token_ids: jax.Array, vocab: int) -> jax.Array:
    """Logits [..., Vd, R] of few tokens as [..., V, R], -inf for all others.

    Args:
      logits: float32.
      token_ids: int32 [Vd], ascending.
      vocab: V.
    """
    everything = jnp.full((*logits.shape[:-2], vocab, logits.shape[-1]), -jnp.inf)
    return everything.at[..., token_ids, :].set(
        logits, unique_indices=True, indices_are_sorted=True
    )


class EagleModel(nnx.Module):
    """See the module's text.

    The embedding and the head may be the target's own arrays.

    Args:
      config: the shape.
      dtype: of activations, norms and biases.
      weights: type of the matrices, see `weight_types`; None: that of `dtype`.
      rngs: for random parameters; None: abstract ones.

    Attributes:
      token_ids: of the tokens it knows, if they are not the target's.
    """

    def __init__(
        self,
        config: EagleConfig,
        *,
        dtype=jnp.float32,
        weights: str | None = None,
        rngs: nnx.Rngs | None,
    ):
        self.config = config
        self.types = types = types_of(dtype, weights)
        layer, D = config.layer, config.layer.embed_dim
        scale = D**-0.5
        axes = "vocab", "embed"
        self.embedding = matrix(rngs, types, axes, (config.target_vocab, D), scale)
        self.head = matrix(rngs, types, axes, (layer.vocab_size, D), scale)
        self.token_ids = first_ids(layer.vocab_size, rngs) if config.reduced else None
        count, wide = len(config.feature_layers), config.target_dim
        norm_of = functools.partial(RMSNorm, layer, types, rngs, "embed")
        norm = functools.partial(norm_of, D)
        inputs = D + wide if config.generation == 1 else count * wide
        axes = ("embed", "features")
        self.fc = matrix(rngs, types, axes, (D, inputs), inputs**-0.5)
        if config.fc_bias:
            self.fc_bias = vector(rngs, types, ("embed",), (D,), 0.0)
        if config.norm_before_fc == "each":
            self.fc_norms = nnx.List([norm_of(wide) for _ in range(count)])
        elif config.norm_before_fc == "all":
            self.fc_norms = nnx.List([norm_of(count * wide)])
        if config.generation == 1:
            self.attention = Attention(layer, types, rngs)
            self.attention_norm = norm() if config.input_norm else None
        else:
            self.attention = Attention(layer, types, rngs, inputs=2 * D)
            self.embed_norm, self.hidden_norm, self.norm = norm(), norm(), norm()
        self.mlp_norm = norm()
        self.mlp = GatedMLP(layer, types, rngs)

    def fuse(self, features: tuple[jax.Array, ...]) -> jax.Array:
        """Rows [D, R] to go on from, of the target's features [F, R] each."""
        if self.config.generation == 1:
            return features[0]
        if self.config.norm_before_fc == "each":
            pairs = zip(self.fc_norms, features, strict=True)
            features = tuple(norm(feature) for norm, feature in pairs)
        x_FR = jnp.concatenate(features, axis=0)
        if self.config.norm_before_fc == "all":
            x_FR = self.fc_norms[0](x_FR)
        return self._fc(x_FR)

    def _fc(self, x_FR):
        y_DR = linear(self.fc[...], x_FR)
        return y_DR + self.fc_bias[...][:, None] if self.config.fc_bias else y_DR

    def inputs(self, tokens_R: jax.Array, hidden_DR: jax.Array):
        """What the attention reads of R rows, and the residual beside it.

        Args:
          tokens_R: int32, the target's numbers.
          hidden_DR: fused features, or outputs of earlier rows.
        """
        with jax.named_scope("inputs"):
            e_DR = rows_of(self.embedding[...], tokens_R, hidden_DR.dtype)
            if self.config.layer.scaled_embeddings:
                e_DR = e_DR * jnp.asarray(e_DR.shape[0] ** 0.5, e_DR.dtype)
            if self.config.generation == 1:
                x_DR = self._fc(jnp.concatenate([e_DR, hidden_DR], axis=0))
                seen_DR = self.attention_norm(x_DR) if self.attention_norm else x_DR
                return seen_DR, x_DR
            normed_DR = self.hidden_norm(hidden_DR)
            x_ER = jnp.concatenate([self.embed_norm(e_DR), normed_DR], axis=0)
            before = self.config.norm_before_residual
            return x_ER, normed_DR if before else hidden_DR

    def outputs(self, residual_DR: jax.Array, attended_DR: jax.Array) -> jax.Array:
        """The layer's rows [D, R] after its attention."""
        x_DR = residual_DR + attended_DR
        return x_DR + self.mlp(self.mlp_norm(x_DR))

    def __call__(
        self,
        tokens_BT: jax.Array,
        hidden_DR: jax.Array,
        positions_BU: jax.Array,
        tree_mask_BTU: jax.Array,
        cache: CacheView | None = None,
        scratch: tuple[jax.Array, ...] | None = None,
    ) -> Forward:
        """Runs T new rows per slot, R = B·T; arguments as of `Transformer`.

        Args:
          tokens_BT: int32, each the token after its row's.
          hidden_DR: see `inputs`.
          positions_BU: int32, of the tree rows.
          tree_mask_BTU: bool.
          cache: the prefix.
          scratch: tree rows of earlier calls.

        Returns:
          The pass; `hidden` is what rows below go on from.
        """
        layer = self.config.layer
        positions_R = positions_BU[:, -tokens_BT.shape[1] :].reshape(-1)
        cos_sin = rotary_angles(layer.rotary, layer.head_dim, positions_R)
        with jax.named_scope("eagle"):
            x_ER, residual_DR = self.inputs(tokens_BT.reshape(-1), hidden_DR)
            attended_DR, kv = self.attention(
                x_ER,
                Rows(cos_sin, tree_mask_BTU, None),
                cache.pages[0] if cache is not None else None,
                cache,
                scratch[0] if scratch is not None else None,
            )
            return Forward(self.outputs(residual_DR, attended_DR), (), (kv,))

    def logit_columns(self, hidden_DR: jax.Array) -> jax.Array:
        """float32 logits [Vd, R] of what follows output rows [D, R]."""
        if self.config.generation == 3:
            hidden_DR = self.norm(hidden_DR)
        with jax.named_scope("head"):
            return linear(self.head[...], hidden_DR, jnp.float32)
