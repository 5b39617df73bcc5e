"""The configuration that a GGUF file's metadata describes; free of jax.

Keys are llama.cpp's. Where a file leaves one out, the value is the one that llama.cpp
takes. Settings that would change what a model computes, and that this decoder does not
have, are errors that name key, value and file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from treespec_jax.checkpoints.families import FAMILIES, Family
from treespec_jax.checkpoints.gguf_source import GgufSource, Header
from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
# One factor per rotary frequency, in which Llama 3's scaling is written down.
ROTARY_FACTORS = "rope_freqs.weight"
# Values that a key may have; a missing key is always right.
_REFUSED: dict[str, tuple] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Layers of the models whose attention is scaled by D / N and not by H, of which
# llama.cpp's files say nothing.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def read_config(header: Header) -> ModelConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
      UserError: an architecture that is not supported, a key missing, or a setting that
        this decoder does not have; names key and value.
    """
    read = _Reader(header)
    try:
        return _config(read, header)
    except UserError as error:
        # Checks of ModelConfig do not know the file.
        named = str(error).startswith(str(header.path))
        raise error if named else UserError(f"{header.path}: {error}") from None


class _Reader:
    """The settings of one file.

    Attributes:
      family: of the architecture that the file names.
    """

    def __init__(self, header: Header):
        self.path: Path = header.path
        self._values: Mapping[str, Any] = header.metadata
        kind = self._values.get("general.type", "model")
        if kind != "model":
            self.refuse("general.type", kind, "model")
        name = self._values.get("general.architecture")
        if name is None:
            self.lacks("general.architecture")
        if name not in ARCHITECTURES:
            self.refuse("general.architecture", name, ", ".join(ARCHITECTURES))
        self.family: Family = FAMILIES[name]
        for key, wanted in _REFUSED.items():
            value = self.get(key)
            if value is not None and value not in wanted:
                self.refuse(self.key(key), value, " or ".join(map(str, wanted)))

    def key(self, name: str) -> str:
        return f"{self.family.name}.{name}"

    def get(self, name: str) -> Any:
        """A setting of the architecture; None: the file does not have it."""
        return self._values.get(self.key(name))

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number; one for each layer counts if all are the same."""
        value = self.get(name)
        if value is None and default is None:
            self.lacks(self.key(name))
        value = default if value is None else value
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        self.check(name, value, type(value) is int and value >= 1, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number; 0 stands for none."""
        value = self.get(name)
        self.check(
            name, value, value is None or type(value) in (int, float), "a number"
        )
        # Stored in float32: the shortest number that is rounded to it was meant.
        return float(str(np.float32(value))) if value else default

    def token(self, name: str) -> int | None:
        """A token's id among the keys of the tokenizer."""
        key = f"tokenizer.ggml.{name}"
        value = self._values.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(f"{self.path}: {key}={value!r:.60} must be a token's id")
        return value

    def check(self, name: str, value: Any, good: bool, wanted: str) -> None:
        if not good:
            key = self.key(name)
            raise UserError(f"{self.path}: {key}={value!r:.60} must be {wanted}")

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(
            f"{self.path}: {key}={value!r:.60} is not supported, only {wanted}"
        )

    def lacks(self, name: str) -> NoReturn:
        raise UserError(
            f"{self.path} lacks {name}; download it again, or convert the original "
            "model again"
        )


def _config(read: _Reader, header: Header) -> ModelConfig:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        read.lacks("tensor token_embd.weight")
    heads, width = read.size("attention.head_count"), read.size("embedding_length")
    layers = read.size("block_count")
    head_dim = read.size("attention.key_length", max(width // heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if read.size(name, head_dim) != head_dim:
            read.refuse(read.key(name), read.get(name), f"{head_dim}, the heads' width")
    window, local = _windows(read, layers)
    positions = read.size("context_length")
    rotary, local_rotary = _rotaries(read, header, positions)
    if rotary.scaling == "yarn":
        stretched = math.floor(rotary.factor * rotary.original_max_positions)
        positions = max(positions, stretched)
    scale = read.number("attention.scale")
    if scale is None and _SCALED_BY_WIDTH.get(read.family.name) == layers:
        scale = (width // heads) ** -0.5
    defaults, activations = read.family.defaults, read.family.activations
    ends = [read.token(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return ModelConfig(
        family=read.family.name,
        vocab_size=embedding.shape[0],
        embed_dim=width,
        mlp_dim=read.size("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=positions,
        rotary=rotary,
        local_rotary=local_rotary if local else None,
        window=window,
        local_layers=local,
        norm_eps=_epsilon(read),
        tied_embeddings="output.weight" not in header.tensors,
        activation=activations[defaults.get(read.family.activation_key, "silu")],
        attention_scale=scale,
        attention_soft_cap=_cap(read, "attn_logit_softcapping"),
        logit_soft_cap=_cap(read, "final_logit_softcapping"),
        bos_id=read.token("bos_token_id"),
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        **read.family.fixed,
    )


def _epsilon(read: _Reader) -> float:
    value = read.number("attention.layer_norm_rms_epsilon")
    if value is None:
        read.lacks(read.key("attention.layer_norm_rms_epsilon"))
    return value


def _cap(read: _Reader, name: str) -> float | None:
    """Only Gemma's models have one, and files may leave the family's own out."""
    if name not in read.family.defaults:
        return None
    return read.number(name, read.family.defaults[name])


def _windows(read: _Reader, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that it limits; None without any."""
    name, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    default = 4096 if read.family.name == "gemma2" else 0
    window = read.get(name)
    window = default if window is None else window
    if not window:
        return None, ()
    read.check(name, window, type(window) is int and window >= 1, "a whole number")
    if read.family.windows != "pattern":
        if window < read.size("context_length"):
            read.refuse(read.key(name), window, "in Gemma 2 and 3")
        return None, ()
    every = read.get(pattern)
    every = read.family.defaults["sliding_window_pattern"] if every is None else every
    if isinstance(every, list):
        read.check(pattern, every, len(every) == layers, f"of {layers} layers")
        local = tuple(i for i, limited in enumerate(every) if limited)
    else:
        read.check(pattern, every, type(every) is int and every >= 1, "a whole number")
        local = tuple(i for i in range(layers) if (i + 1) % every)
    return (window, local) if local else (None, ())


def _rotaries(
    read: _Reader, header: Header, positions: int
) -> tuple[RotaryConfig, RotaryConfig | None]:
    """Of all layers, or of the global ones and of the local ones."""
    defaults = read.family.defaults
    theta = read.number("rope.freq_base", defaults.get("rope_theta", 1e4))
    rotary = _scaled(read, theta, positions)
    if read.family.name == "llama" and ROTARY_FACTORS in header.tensors:
        factors = _factors(header)
        if any(value != 1 for value in factors):
            if rotary.scaling != "none":
                key = read.key("rope.scaling.type")
                read.refuse(key, rotary.scaling, f"none beside {ROTARY_FACTORS}")
            rotary = RotaryConfig(theta, "factors", factors=factors)
    if not read.family.local_rotary:
        return rotary, None
    local = read.number("rope.freq_base_swa", defaults["rope_local_base_freq"])
    return rotary, RotaryConfig(local)


def _scaled(read: _Reader, theta: float, positions: int) -> RotaryConfig:
    factor = read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    kind = read.get("rope.scaling.type")
    # llama.cpp scales linearly where a factor stands alone.
    kind = "linear" if kind is None else kind
    if kind == "none" or (kind == "linear" and factor == 1):
        return RotaryConfig(theta)
    if kind == "linear":
        return RotaryConfig(theta, "linear", factor)
    if kind != "yarn":
        read.refuse(read.key("rope.scaling.type"), kind, "none, linear or yarn")
    # The whole factor, as Hugging Face has it, or one beside that of the formula.
    whole = read.number("rope.scaling.yarn_attn_factor")
    beside = read.number("rope.scaling.attn_factor", 1.0)
    if whole is None and beside != 1:
        whole = beside * (0.1 * math.log(factor) + 1) if factor > 1 else beside
    return RotaryConfig(
        theta,
        "yarn",
        factor,
        read.size("rope.scaling.original_context_length", positions),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=whole,
    )


def _factors(header: Header) -> tuple[float, ...]:
    (size,) = header.tensors[ROTARY_FACTORS].shape
    values = GgufSource(header.path).read(ROTARY_FACTORS, (slice(0, size),))
    return tuple(float(str(value)) for value in values)
