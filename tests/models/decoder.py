"""A decoder in float64 numpy, one text at a time, straight from the formulas.

Full attention over the whole text: no cache, no tree, no paging, nothing of the
package but its parameter names. The configurations cover every feature.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.models.transformer import Transformer

PLAIN = ModelConfig(
    vocab_size=61,
    embed_dim=24,
    mlp_dim=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
)


def _like(**changes) -> ModelConfig:
    return dataclasses.replace(PLAIN, **changes)


_GEMMA = dict(
    unit_offset_norms=True,
    scaled_embeddings=True,
    tied_embeddings=True,
    activation="gelu_tanh",
)
# Original lengths are a few tokens, so that texts go beyond them.
FAMILIES = {
    "linear": _like(rotary=RotaryConfig(scaling="linear", factor=4.0)),
    "llama3": _like(
        rotary=RotaryConfig(
            scaling="llama3", factor=8.0, original_max_positions=16, theta=50.0
        )
    ),
    "yarn": _like(
        rotary=RotaryConfig(
            scaling="yarn",
            factor=4.0,
            original_max_positions=12,
            beta_fast=1.5,
            beta_slow=0.1,
        )
    ),
    "qwen2": _like(qkv_bias=True, rotary=RotaryConfig(theta=1e6)),
    "qwen3": _like(qk_norm=True, tied_embeddings=True),
    "mistral": _like(window=3, local_layers=(0, 1), head_dim=6),
    "gemma": _like(**_GEMMA, num_kv_heads=1),
    "gemma2": _like(
        **_GEMMA,
        post_norms=True,
        window=6,
        local_layers=(0,),
        attention_scale=12.0**-0.5,
        attention_soft_cap=2.0,
        logit_soft_cap=3.0,
    ),
    "gemma3": _like(
        **_GEMMA,
        post_norms=True,
        qk_norm=True,
        num_layers=3,
        window=4,
        local_layers=(0, 1),
        attention_scale=12.0**-0.5,
        rotary=RotaryConfig(theta=1000.0, scaling="linear", factor=8.0),
        local_rotary=RotaryConfig(theta=20.0),
    ),
}


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random in every parameter: norms and biases are not left at one and zero."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    state = nnx.state(model)
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] in ("scale", "qkv_bias"):
            noise = rng.normal(size=leaf[...].shape) * 0.3
            leaf[...] = leaf[...] + jnp.asarray(noise, leaf[...].dtype)
    nnx.update(model, state)
    # Logits spread enough to be far from ties.
    model.norm.scale[...] = model.norm.scale[...] * 3.0 + config.unit_offset_norms * 2
    return model


def speeds(rotary: RotaryConfig, head_dim: int) -> list[float]:
    """Radians per position of every pair, one by one."""
    found = []
    length, factor = rotary.original_max_positions, rotary.factor
    for pair in range(head_dim // 2):
        plain = 1 / rotary.theta ** (2 * pair / head_dim)
        wavelength = 2 * math.pi / plain
        if rotary.scaling == "linear":
            plain /= factor
        elif rotary.scaling == "llama3":
            # Llama 3.1's reference code, in wavelengths.
            low, high = rotary.low_freq_factor, rotary.high_freq_factor
            if wavelength > length / low:
                plain /= factor
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                plain = (1 - smooth) * plain / factor + smooth * plain
        elif rotary.scaling == "yarn":
            # The pair that turns r times over the length L solves
            # L = 2 pi r theta^(2 pair / H); between two such pairs is a ramp.
            ends = [
                head_dim * math.log(length / (2 * math.pi * turns)) / 2
                / math.log(rotary.theta)
                for turns in (rotary.beta_fast, rotary.beta_slow)
            ]  # fmt: skip
            if rotary.truncate:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            first, last = max(ends[0], 0), min(ends[1], head_dim - 1)
            share = min(max((pair - first) / (last - first), 0), 1)
            plain = share * plain / factor + (1 - share) * plain
        found.append(plain)
    return found


def temperature(rotary: RotaryConfig) -> float:
    """Factor of cosines and sines (YaRN, section 3.4)."""
    if rotary.scaling != "yarn":
        return 1.0
    return rotary.attention_factor or 0.1 * math.log(rotary.factor) + 1


def logits(model: Transformer, ids: list[int]) -> np.ndarray:
    """Logits [len(ids), V] of one text."""
    config = model.config
    w = {
        ".".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    x = w["embedding"][ids]
    if config.scaled_embeddings:
        x = x * math.sqrt(config.embed_dim)
    for i in range(config.num_layers):
        at = f"layers.{i}"
        out = _attention(
            config, w, i, _norm(config, x, w[f"{at}.attention_norm.scale"])
        )
        if config.post_norms:
            out = _norm(config, out, w[f"{at}.attention_post_norm.scale"])
        x = x + out
        gate, up = (
            w[f"{at}.mlp.gate_up"] @ _norm(config, x, w[f"{at}.mlp_norm.scale"]).T
        )
        if config.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            gate = gate * (1 + np.tanh(inner)) / 2
        out = (w[f"{at}.mlp.down"] @ (gate * up)).T
        if config.post_norms:
            out = _norm(config, out, w[f"{at}.mlp_post_norm.scale"])
        x = x + out
    head = w["embedding" if config.tied_embeddings else "head"]
    found = _norm(config, x, w["norm.scale"]) @ head.T
    cap = config.logit_soft_cap
    return cap * np.tanh(found / cap) if cap else found


def _norm(config, x, scale):
    scale = scale + 1 if config.unit_offset_norms else scale
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def _attention(config, w, layer, x):
    at = f"layers.{layer}.attention"
    local = layer in config.local_layers
    rotary = config.local_rotary if local else config.rotary
    rotary = rotary or config.rotary
    length, (_, G, H) = len(x), w[f"{at}.qkv"].shape[:3]
    G -= 2
    angle = np.outer(np.arange(length), speeds(rotary, H))
    turn = np.exp(1j * angle) * temperature(rotary)

    def rotated(rows):
        pairs = (rows[:, : H // 2] + 1j * rows[:, H // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    def ready(rows, kind):
        if config.qk_norm:
            rows = _norm(config, rows, w[f"{at}.{kind}_norm.scale"])
        return rotated(rows)

    seen = np.tril(np.ones((length, length), bool))
    if local:
        seen &= ~np.tril(seen, -config.window)
    out = np.zeros_like(x)
    for n in range(config.num_heads):
        head, g = divmod(n, G)
        query, key, value = (
            x @ w[f"{at}.qkv"][head, j].T
            + (w[f"{at}.qkv_bias"][head, j] if config.qkv_bias else 0)
            for j in (g, G, G + 1)
        )
        scores = ready(query, "q") @ ready(key, "k").T
        scores *= config.attention_scale or 1 / math.sqrt(H)
        cap = config.attention_soft_cap
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(np.where(seen, scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ value @ w[f"{at}.out"][:, n].T
    return out
