"""Building blocks of the decoder: norm, rotary positions, attention, gated MLP.

Every parameter is declared once, with shape, logical axes and initialiser; abstract
values, shardings and random parameters all derive from that declaration.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.tree_attention import tree_attention
from treespec_jax.config import ModelConfig
from treespec_jax.models.linear import linear
from treespec_jax.models.views import CacheView


def param(rngs: nnx.Rngs, dtype, axes: tuple[str, ...], shape, scale: float | None):
    """A parameter with logical axis names: normal with `scale`, or ones if None."""
    if scale is None:
        value = jnp.ones(shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape) * scale).astype(dtype)
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale, in float32 (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.scale = param(rngs, dtype, ("embed",), (config.embed_dim,), None)

    def __call__(self, x_DR: jax.Array) -> jax.Array:
        x = x_DR.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + self.eps)
        scale_D1 = self.scale[...].astype(jnp.float32)[:, None]
        return (x * inverse * scale_D1).astype(x_DR.dtype)


def rotary_angles(config: ModelConfig, positions_R: jax.Array):
    """cos and sin, float32 [H/2, R] each (rotary, Su et al., 2104.09864)."""
    half = config.head_dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    inverse_H2 = config.rope_theta**-exponents
    angles = inverse_H2[:, None] * positions_R.astype(jnp.float32)[None, :]
    # The result of a conditional is not fused into its users: a CPU would compute
    # sines and cosines again for every head of every layer.
    return jax.lax.cond(
        positions_R[0] >= 0,
        lambda: (jnp.cos(angles), jnp.sin(angles)),
        lambda: (angles, angles),
    )


def apply_rotary(x_xHR: jax.Array, cos_sin) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of the axis before the last."""
    cos, sin = cos_sin
    first, second = jnp.split(x_xHR.astype(jnp.float32), 2, axis=-2)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-2).astype(x_xHR.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over a paged prefix and a token tree."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.config = config
        D, N, K, G, H = (
            config.embed_dim,
            config.num_heads,
            config.num_kv_heads,
            config.queries_per_kv,
            config.head_dim,
        )
        # Per key/value head: its G query heads, then its key, then its value.
        self.qkv = param(
            rngs,
            dtype,
            ("kv_heads", "qkv", "head_dim", "embed"),
            (K, G + 2, H, D),
            D**-0.5,
        )
        self.out = param(
            rngs,
            dtype,
            ("embed", "heads", "head_dim"),
            (D, N, H),
            (N * H * 2 * config.num_layers) ** -0.5,
        )

    def __call__(self, x_DR, cos_sin, tree_mask_BTU, pages, view, scratch):
        """Returns the [D, R] output and this call's own rows [B, K, 2, T, H]."""
        cfg = self.config
        B, T, _ = tree_mask_BTU.shape
        K, G, H = cfg.num_kv_heads, cfg.queries_per_kv, cfg.head_dim
        qkv_KxHR = linear(self.qkv[...], x_DR)
        qk_KxHR = apply_rotary(qkv_KxHR[:, : G + 1], cos_sin)
        q_BTNH = qk_KxHR[:, :G].reshape(K * G, H, B, T).transpose(2, 3, 0, 1)
        kv_K2HR = jnp.stack([qk_KxHR[:, G], qkv_KxHR[:, G + 1]], axis=1)
        kv_BK2TH = kv_K2HR.reshape(K, 2, H, B, T).transpose(3, 0, 1, 4, 2)
        tree_kv = kv_BK2TH
        if scratch is not None:
            tree_kv = jnp.concatenate([scratch, kv_BK2TH], axis=3)
        out_BTNH = tree_attention(
            q_BTNH,
            pages,
            view.page_table if view is not None else None,
            view.lengths if view is not None else None,
            tree_kv,
            tree_mask_BTU,
            scale=H**-0.5,
        )
        out_ER = out_BTNH.transpose(2, 3, 0, 1).reshape(K * G * H, B * T)
        return linear(self.out[...], out_ER), kv_BK2TH


class GatedMLP(nnx.Module):
    """down(silu(gate x) · up x) (Shazeer, 2002.05202)."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.gate_up = param(
            rngs, dtype, ("gate_up", "mlp", "embed"), (2, F, D), D**-0.5
        )
        self.down = param(
            rngs,
            dtype,
            ("embed", "mlp"),
            (D, F),
            (F * 2 * config.num_layers) ** -0.5,
        )

    def __call__(self, x_DR: jax.Array) -> jax.Array:
        gate_FR, up_FR = linear(self.gate_up[...], x_DR)
        return linear(self.down[...], jax.nn.silu(gate_FR) * up_FR)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, dtype, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(config, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs)

    def __call__(
        self, x_DR, cos_sin, tree_mask_BTU, pages, view: CacheView | None, scratch
    ):
        with jax.named_scope("attention"):
            out_DR, kv = self.attention(
                self.attention_norm(x_DR), cos_sin, tree_mask_BTU, pages, view, scratch
            )
            x_DR = x_DR + out_DR
        with jax.named_scope("mlp"):
            return x_DR + self.mlp(self.mlp_norm(x_DR)), kv
