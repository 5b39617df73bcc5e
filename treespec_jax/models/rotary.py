"""Rotary positions (Su et al., 2104.09864) and their ways of stretching a text.

Frequencies are numpy constants, rounded once from float64, by the formulas that
published models were trained with.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.branches import on_cpu
from treespec_jax.config import RotaryConfig
from treespec_jax.models.arithmetic import Arithmetic


def frequencies(config: RotaryConfig, head_dim: int) -> np.ndarray:
    """Radians per position of the pairs (i, i + H/2), float64 [H/2]."""
    half = head_dim // 2
    plain = config.theta ** -(np.arange(half) / half)
    stretched = plain / config.factor
    if config.scaling == "linear":
        return stretched
    if config.scaling == "factors":
        return plain / np.asarray(config.factors)
    if config.scaling == "llama3":
        low, high = config.low_freq_factor, config.high_freq_factor
        # Rotations over the original length: many keep their speed.
        turns = config.original_max_positions * plain / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * plain + (1 - keep) * stretched
    if config.scaling == "yarn":
        first = max(_yarn_pair(config, head_dim, config.beta_fast, math.floor), 0)
        last = _yarn_pair(config, head_dim, config.beta_slow, math.ceil)
        last = min(last, head_dim - 1)
        # Published code keeps a ramp of no width steep, not infinitely so.
        width = last - first or 0.001
        keep = 1 - np.clip((np.arange(half) - first) / width, 0, 1)
        return keep * plain + (1 - keep) * stretched
    return plain


def _yarn_pair(config: RotaryConfig, head_dim: int, turns: float, rounded) -> float:
    """The pair that turns so often over the original length."""
    positions = config.original_max_positions
    pair = head_dim * math.log(positions / (turns * 2 * math.pi))
    pair /= 2 * math.log(config.theta)
    return rounded(pair) if config.truncate else pair


def attention_factor(config: RotaryConfig) -> float:
    """What cosines and sines are multiplied by: yarn's temperature, else 1."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def scaled(by: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * by * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scaled(config.mscale) / scaled(config.mscale_all_dim)
    return scaled(1.0)


def rotary_angles(config: RotaryConfig, head_dim: int, positions_R: jax.Array):
    """cos and sin of every pair at every position, float32 [H/2, R] each."""
    speed_H2 = jnp.asarray(frequencies(config, head_dim), jnp.float32)
    angles = speed_H2[:, None] * positions_R.astype(jnp.float32)[None, :]
    by = attention_factor(config)

    def table():
        pair = jnp.cos(angles), jnp.sin(angles)
        return pair if by == 1 else (pair[0] * by, pair[1] * by)

    def apart():
        # The result of a conditional is not fused into its users: a CPU would compute
        # sines and cosines again for every head of every layer.
        return jax.lax.cond(positions_R[0] >= 0, table, lambda: (angles, angles))

    return on_cpu(apart, table)


def apply_rotary(x_xHR: jax.Array, cos_sin, arithmetic: Arithmetic) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of the axis before the last."""
    (cos, sin), rounded = cos_sin, arithmetic.rounded
    first, second = jnp.split(x_xHR.astype(jnp.float32), 2, axis=-2)
    rotated = [
        rounded(first * cos) - rounded(second * sin),
        rounded(second * cos) + rounded(first * sin),
    ]
    return jnp.concatenate(rotated, axis=-2).astype(x_xHR.dtype)
