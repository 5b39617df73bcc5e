"""Building blocks of the decoder: norm, attention, gated MLP.

Every parameter is declared once, with shape, logical axes and initialiser; abstract
values, shardings and random parameters all derive from that declaration.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.tree_attention import (
    AttentionSpec,
    Operands,
    dequantize_rows,
    quantize_rows,
    tree_attention,
)
from treespec_jax.config import ModelConfig
from treespec_jax.models.arithmetic import Arithmetic
from treespec_jax.models.linear import abstract_weight, linear, weight_of
from treespec_jax.models.rotary import apply_rotary
from treespec_jax.models.views import CacheView
from treespec_jax.models.weight_types import Types
from treespec_jax.sharding import Placement


def vector(rngs: nnx.Rngs | None, types: Types, axes: tuple[str, ...], shape, fill=1.0):
    """A parameter that no product reads, with logical axis names, filled with `fill`.

    Without `rngs` it is abstract: a shape and a dtype.
    """
    if rngs is None:
        value = jax.ShapeDtypeStruct(shape, types.dtype)
    else:
        value = jnp.full(shape, fill, types.dtype)
    return nnx.Param(value, logical_axes=axes)


def matrix(
    rngs: nnx.Rngs | None,
    types: Types,
    axes: tuple[str, ...],
    shape,
    scale: float,
    inputs: int = 1,
):
    """A parameter for `linear`, in the type of weights: normal with `scale`.

    Args:
      rngs: None: it is abstract.
      types: of the model.
      axes: logical names.
      shape: [*out, *in].
      scale: standard deviation.
      inputs: how many axes `in` are.
    """
    if rngs is None:
        value = abstract_weight(shape, types, inputs)
    else:
        value = weight_of(
            jax.random.normal(rngs.params(), shape) * scale, types, inputs
        )
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale, in float32 (Zhang & Sennrich, 1910.07467).

    The axis before the last is normalised: the features of [D, R], or the width of
    every head of [..., H, R]. With `unit_offset_norms` 1 + scale multiplies.

    Args:
      config: of the model.
      types: of the model.
      rngs: unused; a scale begins where it changes nothing.
      axis: logical name of the axis.
      size: of the axis.
    """

    def __init__(
        self, config: ModelConfig, types: Types, rngs: nnx.Rngs, axis: str, size
    ):
        self.arithmetic = Arithmetic()
        self.eps = config.norm_eps
        self.offset = 1.0 if config.unit_offset_norms else 0.0
        self.scale = vector(rngs, types, (axis,), (size,), 1 - self.offset)

    def __call__(self, x_xDR: jax.Array) -> jax.Array:
        x, rounded = x_xDR.astype(jnp.float32), self.arithmetic.rounded
        inverse = self.arithmetic.inverse_rms(x, self.eps)
        scale_D1 = self.scale[...].astype(jnp.float32)[:, None]
        if self.offset:
            scale_D1 += self.offset
        return rounded(rounded(x * inverse) * scale_D1).astype(x_xDR.dtype)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What attention knows of the rows of a pass, R = B·T.

    Attributes:
      cos_sin: rotary angles of the new rows, float32 [H/2, R] each.
      mask: bool [B, T, U], which of the U tree rows each new row sees.
      depth: int32 [B, U], depth of the tree rows; None without a window.
    """

    cos_sin: tuple[jax.Array, jax.Array]
    mask: jax.Array
    depth: jax.Array | None


class Attention(nnx.Module):
    """Grouped-query attention over a paged prefix and a token tree.

    Args:
      config: of the model.
      types: of the model.
      rngs: for random parameters.
      local: whether this layer sees only the `window` of the configuration.
      inputs: width of the rows that it reads; None: the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        types: Types,
        rngs: nnx.Rngs,
        local: bool = False,
        inputs: int | None = None,
    ):
        self.arithmetic = Arithmetic()
        self.config = config
        self.window = config.window if local else None
        D, N, K, G, H = (
            config.embed_dim,
            config.num_heads,
            config.num_kv_heads,
            config.queries_per_kv,
            config.head_dim,
        )
        # Per key/value head: its G query heads, then its key, then its value.
        self.qkv = matrix(
            rngs,
            types,
            ("kv_heads", "qkv", "head_dim", "embed"),
            (K, G + 2, H, inputs or D),
            (inputs or D) ** -0.5,
        )
        if config.qkv_bias:
            axes = ("kv_heads", "qkv", "head_dim")
            self.qkv_bias = vector(rngs, types, axes, (K, G + 2, H), 0.0)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, types, rngs, "head_dim", H)
            self.k_norm = RMSNorm(config, types, rngs, "head_dim", H)
        self.out = matrix(
            rngs,
            types,
            ("embed", "heads", "head_dim"),
            (D, N, H),
            (N * H * 2 * config.num_layers) ** -0.5,
            inputs=2,
        )

    def project(self, x_DR, cos_sin, batch: int) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, N, H] and rows of the cache [B, K, 2, T, H] of R = B·T rows.

        Args:
          x_DR: rows of a pass.
          cos_sin: their rotary angles.
          batch: B.
        """
        cfg = self.config
        K, G, H = cfg.num_kv_heads, cfg.queries_per_kv, cfg.head_dim
        B, T = batch, x_DR.shape[1] // batch
        qkv_KxHR = linear(self.qkv[...], x_DR)
        if cfg.qkv_bias:
            qkv_KxHR += self.qkv_bias[...][..., None]
        qk_KxHR = qkv_KxHR[:, : G + 1]
        if cfg.qk_norm:
            normed = self.q_norm(qk_KxHR[:, :G]), self.k_norm(qk_KxHR[:, G:])
            qk_KxHR = jnp.concatenate(normed, axis=1)
        qk_KxHR = apply_rotary(qk_KxHR, cos_sin, self.arithmetic)
        q_BTNH = qk_KxHR[:, :G].reshape(K * G, H, B, T).transpose(2, 3, 0, 1)
        kv_K2HR = jnp.stack([qk_KxHR[:, G], qkv_KxHR[:, G + 1]], axis=1)
        return q_BTNH, kv_K2HR.reshape(K, 2, H, B, T).transpose(3, 0, 1, 4, 2)

    def combine(self, out_BTNH: jax.Array) -> jax.Array:
        """What attention gave the heads, as rows [D, R]."""
        B, T, N, H = out_BTNH.shape
        out_ER = out_BTNH.transpose(2, 3, 0, 1).reshape(N * H, B * T)
        return linear(self.out[...], out_ER)

    def __call__(self, x_DR, rows: Rows, pages, view: CacheView | None, scratch):
        """Returns the [D, R] output and this call's own rows [B, K, 2, T, H]."""
        cfg, B = self.config, rows.mask.shape[0]
        q_BTNH, kv_BK2TH = self.project(x_DR, rows.cos_sin, B)
        scales = None
        if isinstance(pages, tuple):
            # The tree sees what the cache will keep: whether a token was drafted or
            # is committed already changes nothing.
            kv_BK2TH = dequantize_rows(*quantize_rows(kv_BK2TH), kv_BK2TH.dtype)
            pages, scales = pages
        tree_kv = kv_BK2TH
        if scratch is not None:
            tree_kv = jnp.concatenate([scratch, kv_BK2TH], axis=3)
        placement = view.pages.placement if view is not None else Placement()
        operands = Operands(
            queries=q_BTNH,
            kv_pages=pages,
            page_table=view.page_table if view is not None else None,
            lengths=view.lengths if view is not None else None,
            tree_kv=tree_kv,
            tree_mask=rows.mask,
            tree_depth=None if self.window is None else rows.depth,
            kv_scales=scales,
        )
        spec = AttentionSpec(
            scale=cfg.attention_scale or cfg.head_dim**-0.5,
            window=self.window,
            soft_cap=cfg.attention_soft_cap,
            implementation=self.arithmetic.attention,
            device_kind=placement.device_kind,
            mesh=placement.mesh,
            heads_axis=placement.axis,
        )
        return self.combine(tree_attention(operands, spec)), kv_BK2TH


class GatedMLP(nnx.Module):
    """down(activation(gate x) · up x) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig, types: Types, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.arithmetic = Arithmetic()
        self.activation = config.activation
        self.gate_up = matrix(
            rngs, types, ("gate_up", "mlp", "embed"), (2, F, D), D**-0.5
        )
        self.down = matrix(
            rngs,
            types,
            ("embed", "mlp"),
            (D, F),
            (F * 2 * config.num_layers) ** -0.5,
        )

    def __call__(self, x_DR: jax.Array) -> jax.Array:
        gate_FR, up_FR = linear(self.gate_up[...], x_DR)
        active_FR = self.arithmetic.activate(self.activation, gate_FR)
        return linear(self.down[...], active_FR * up_FR)


class Block(nnx.Module):
    """One decoder layer: norms before attention and MLP, and after where asked for."""

    def __init__(self, config: ModelConfig, types: Types, rngs: nnx.Rngs, local: bool):
        norm = functools.partial(
            RMSNorm, config, types, rngs, "embed", config.embed_dim
        )
        self.post_norms = config.post_norms
        self.attention_norm = norm()
        self.attention = Attention(config, types, rngs, local)
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, types, rngs)
        if config.post_norms:
            self.attention_post_norm = norm()
            self.mlp_post_norm = norm()

    def __call__(self, x_DR, rows: Rows, pages, view: CacheView | None, scratch):
        with jax.named_scope("attention"):
            out_DR, kv = self.attention(
                self.attention_norm(x_DR), rows, pages, view, scratch
            )
            if self.post_norms:
                out_DR = self.attention_post_norm(out_DR)
            x_DR = x_DR + out_DR
        with jax.named_scope("mlp"):
            out_DR = self.mlp(self.mlp_norm(x_DR))
            if self.post_norms:
                out_DR = self.mlp_post_norm(out_DR)
            return x_DR + out_DR, kv
