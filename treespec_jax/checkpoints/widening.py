"""Makes a model larger without changing its function.

A benchmark needs the cost of a large model, and acceptance rates of models that were
trained independently of each other. Two small trained models, widened, give both.
Every size of the configuration may grow. Logits stay equal up to rounding, because all
that is added is multiplied by zero somewhere. Zeros stand only where they are needed;
all other new weights are random. A forward pass reads every byte of either kind.

The letters of sizes are those of `treespec_jax`; a prime marks the larger model.

* Width D: the residual stream gets D' - D channels that stay 0, because the embedding
  and all output projections have zeros there. RMSNorm divides by the root of the mean
  square over the width. Zero channels lower the mean square by D / D', so that

      scale' = scale · sqrt(D / D'),   eps' = eps · D / D'

  give x · scale' / sqrt(mean'(x²) + eps') = x · scale / sqrt(mean(x²) + eps).
* Heads N, K: new heads compute something, and the output projection has zeros for them.
  If the groups G' = N' / K' are smaller than G = N / K, ceil(G / G') copies of a
  key/value head share its G query heads.
* Head width H: keys and values are 0 in the new dimensions. Pair i turns by
  theta^(-2i/H) per position, so theta' = theta^(H'/H) keeps the frequencies of the
  first H / 2 pairs (for every scaling of `RotaryConfig`). `attention_scale` keeps the
  factor of the scores, 1 / sqrt(H) by default.
* MLP width F: the down projection has zeros for the new features.
* Layers L: new layers stand between the old ones. Their output and down projections are
  0, so that they add nothing.
* Vocabulary V: new rows have logits so low that they are never chosen. Two of the new
  channels, c and d, hold the constant a in the embedding of every old token. The mean
  square of x grows by 2a² / D'; taking that off eps' keeps every norm exact:

      a = sqrt(D · eps) / 2,   eps' = eps · D / D' - 2a² / D' = eps · D / (2 D')

  All norms but the last have scale 0 at c and d. The last one has b · sqrt(D / D') at c
  and the negative at d: they cancel in the old rows of a tied head, which hold a in
  both. The new rows hold -m at c and 0 at d. With b · a · m = 1e6 their logits are near
  -1e6 / r, where r is the root mean square of the last hidden state.

Two models over one vocabulary, widened to one vocabulary size, still are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from treespec_jax.checkpoints.loading import LoadedModel, check_floats
from treespec_jax.checkpoints.placement import (
    abstract_parameters,
    concrete,
    parameters_of,
)
from treespec_jax.checks import check_int
from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError
from treespec_jax.models.weight_types import types_of

Arrays = dict[str, np.ndarray]  # by dotted path

# m and b · a · m of the docstring. float16 holds m.
_MARK, _STRENGTH = 3e4, 1e6
# Each normalises, multiplies or caps something that the formulas above do not cover.
_UNSUPPORTED = (
    "scaled_embeddings",
    "qk_norm",
    "post_norms",
    "unit_offset_norms",
    "logit_soft_cap",
)


def widened_config(config: ModelConfig, sizes: Mapping[str, int | None]) -> ModelConfig:
    """The configuration of the larger model.

    Args:
      config: of the model to widen.
      sizes: new values of some of `ModelConfig.SIZES`; None, or a missing name, keeps
        the old one.

    Raises:
      UserError: an architecture that cannot be widened, or a size that cannot be
        reached, named.
    """
    for name in _UNSUPPORTED:
        if getattr(config, name):
            raise UserError(
                f"a {config.family} model with {name} cannot be widened; take a Llama, "
                "Mistral or Qwen2 model"
            )
    chosen = {name: size for name, size in sizes.items() if size is not None}
    for name, size in chosen.items():
        if name not in config.SIZES:
            known = ", ".join(config.SIZES)
            raise UserError(f"size {name!r} is unknown; choose from {known}")
        check_int(name, size, 1)
        if size < getattr(config, name):
            raise UserError(
                f"{name}={size} is below the model's {getattr(config, name)}; a model "
                "can only grow"
            )
    wide = {name: chosen.get(name, getattr(config, name)) for name in config.SIZES}
    growth = config.embed_dim / wide["embed_dim"]
    constants = {"norm_eps": config.norm_eps * growth}
    if wide["vocab_size"] > config.vocab_size:
        constants["norm_eps"] /= 2
        if wide["embed_dim"] < config.embed_dim + 2:
            raise UserError(
                f"vocab_size={wide['vocab_size']} needs two more channels; raise "
                f"embed_dim to {config.embed_dim + 2} at least"
            )
        if not config.norm_eps:
            raise UserError(
                f"vocab_size={wide['vocab_size']} cannot be reached from a model with "
                "norm_eps=0; keep its vocabulary"
            )
    if wide["head_dim"] > config.head_dim:
        ratio = wide["head_dim"] / config.head_dim
        for name in ("rotary", "local_rotary"):
            if getattr(config, name) is not None:
                constants[name] = _slower(getattr(config, name), ratio)
        constants["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    positions = _layer_positions(config, wide["num_layers"])
    constants["local_layers"] = tuple(positions[i] for i in config.local_layers)
    larger = dataclasses.replace(config, **wide, **constants)
    _head_groups(config, larger)
    return larger


def widen(loaded: LoadedModel, config: ModelConfig, seed: int = 0) -> LoadedModel:
    """The larger model, with the dtype and the tokenizer of the small one.

    Args:
      loaded: the small model.
      config: `widened_config` of its configuration.
      seed: of the random weights.

    Raises:
      UserError: its weights are in int8.
    """
    check_floats(loaded)
    old = loaded.config
    small = {
        path: np.asarray(leaf[...])
        for path, leaf in parameters_of(loaded.model).items()
    }
    graph, state, shapes = abstract_parameters(config, types_of(loaded.dtype))
    rngs = np.random.default_rng(seed).spawn(len(shapes))

    def make(rng, path):
        return _random(rng, path, shapes[path].shape, config).astype(loaded.dtype)

    with ThreadPoolExecutor() as pool:
        wide = dict(zip(shapes, pool.map(make, rngs, shapes), strict=True))
    positions = _layer_positions(old, config.num_layers)
    for i in range(config.num_layers):
        if i in positions:
            before = _below(small, f"layers.{positions.index(i)}.")
            filled = _fill_layer(_below(wide, f"layers.{i}."), before, old, config)
            wide |= {f"layers.{i}.{name}": values for name, values in filled.items()}
        else:
            for name in ("attention.out", "mlp.down"):
                wide[f"layers.{i}.{name}"][:] = 0
    wide |= _fill_vocabulary(wide, small, old, config)
    arrays = {path: jax.device_put(values) for path, values in wide.items()}
    model = concrete(graph, state, arrays)
    return dataclasses.replace(loaded, config=config, model=model)


def _slower(rotary: RotaryConfig, ratio: float) -> RotaryConfig:
    """The first pairs of heads `ratio` times as wide turn as before."""
    try:
        theta = rotary.theta**ratio
    except OverflowError:
        raise UserError(
            f"heads {ratio:g} times as wide need rotary theta {rotary.theta:g} to that "
            "power, which is too large; lower head_dim"
        ) from None
    count = round(len(rotary.factors) * ratio)
    factors = rotary.factors + (1.0,) * (count - len(rotary.factors))
    return dataclasses.replace(rotary, theta=theta, factors=factors)


def _layer_positions(config: ModelConfig, count: int) -> list[int]:
    """Indices of the old layers among `count` layers."""
    return [layer * count // config.num_layers for layer in range(config.num_layers)]


def _head_groups(config: ModelConfig, wide: ModelConfig) -> list[range]:
    """Old query heads of each used key/value head of the larger model.

    Raises:
      UserError: too few key/value heads.
    """
    G, wide_G = config.queries_per_kv, wide.queries_per_kv
    groups = [
        range(first, min(first + wide_G, (k + 1) * G))
        for k in range(config.num_kv_heads)
        for first in range(k * G, (k + 1) * G, wide_G)
    ]
    if len(groups) > wide.num_kv_heads:
        raise UserError(
            f"num_heads={wide.num_heads} and num_kv_heads={wide.num_kv_heads} leave "
            f"{wide_G} query heads per key/value head, the model has {G}: "
            f"{len(groups)} key/value heads are needed; raise num_kv_heads or num_heads"
        )
    return groups


def _random(
    rng: np.random.Generator, path: str, shape: Sequence[int], config: ModelConfig
) -> np.ndarray:
    """Weights that keep activations near 1; scales of 1, biases of 0."""
    if path.endswith(("scale", "bias")):
        return np.full(shape, path.endswith("scale"), np.float32)
    normal = rng.standard_normal(shape, np.float32)
    return normal * np.float32(config.embed_dim**-0.5)


def _fill_layer(
    wide: Arrays, small: Arrays, old: ModelConfig, config: ModelConfig
) -> Arrays:
    """The parameters of a layer that computes what the small one does."""
    shrink = math.sqrt(old.embed_dim / config.embed_dim)
    filled = {
        name: _padded(small[name] * shrink, wide[name].shape)
        for name in ("attention_norm.scale", "mlp_norm.scale")
    }
    gate_up = wide["mlp.gate_up"]
    gate_up[:, : old.mlp_dim, : old.embed_dim] = small["mlp.gate_up"]
    filled["mlp.gate_up"] = gate_up
    filled["mlp.down"] = _padded(small["mlp.down"], wide["mlp.down"].shape)
    qkv, out = wide["attention.qkv"], np.zeros_like(wide["attention.out"])
    bias = wide.get("attention.qkv_bias")
    D, G, wide_G = old.embed_dim, old.queries_per_kv, config.queries_per_kv
    # Rotary pairs are (i, i + H/2).
    pairs = np.arange(old.head_dim // 2)
    dims = np.concatenate([pairs, config.head_dim // 2 + pairs])
    new_dims = np.setdiff1d(np.arange(config.head_dim), dims)
    for k, heads in enumerate(_head_groups(old, config)):
        qkv[k, wide_G:][:, new_dims] = 0
        old_k = heads[0] // G
        # Queries, then the key, then the value.
        parts = [(slot, head % G) for slot, head in enumerate(heads)]
        for part, old_part in [*parts, (wide_G, G), (wide_G + 1, G + 1)]:
            qkv[k, part, dims, :D] = small["attention.qkv"][old_k, old_part]
            if bias is not None:
                bias[k, part, dims] = small["attention.qkv_bias"][old_k, old_part]
        for slot, head in enumerate(heads):
            out[:D, k * wide_G + slot, dims] = small["attention.out"][:, head]
    filled |= {"attention.qkv": qkv, "attention.out": out}
    return filled if bias is None else filled | {"attention.qkv_bias": bias}


def _fill_vocabulary(
    wide: Arrays, small: Arrays, old: ModelConfig, config: ModelConfig
) -> Arrays:
    """Embedding, last norm and head."""
    V, D = old.vocab_size, old.embed_dim
    shrink = math.sqrt(D / config.embed_dim)
    filled = {"norm.scale": _padded(small["norm.scale"] * shrink, (config.embed_dim,))}
    head = "embedding" if old.tied_embeddings else "head"
    for name in dict.fromkeys(["embedding", head]):
        filled[name] = wide[name]
        filled[name][:V] = _padded(small[name], (V, config.embed_dim))
    if config.vocab_size > V:
        constant = math.sqrt(D * old.norm_eps) / 2
        gain = _STRENGTH / (_MARK * constant) * shrink
        filled["norm.scale"][D : D + 2] = gain, -gain
        filled["embedding"][:V, D : D + 2] = constant
        filled[head][V:, D : D + 2] = -_MARK, 0
    return filled


def _below(arrays: Arrays, prefix: str) -> Arrays:
    """Those whose paths begin with `prefix`, without it."""
    return {
        path.removeprefix(prefix): values
        for path, values in arrays.items()
        if path.startswith(prefix)
    }


def _padded(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`values` with zeros behind them along every axis."""
    return np.pad(values, [(0, n) for n in np.subtract(shape, values.shape)])
