"""`config.json` of a Hugging Face folder, in every spelling; free of jax.

Settings that would change what a model computes, and that this decoder does not have,
are errors that name key, value and file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from treespec_jax.checkpoints import foreign
from treespec_jax.checkpoints.families import FAMILIES, Family
from treespec_jax.checkpoints.files import read_json
from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError

# Of every family; null and a missing key are always right.
_REFUSED: dict[str, tuple] = {
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
_SCALINGS = ("default", "linear", "llama3", "yarn")
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_config(path: Path) -> ModelConfig:
    """Reads `config.json`, with the defaults that transformers has for the family.

    Tokens that end a text are those of `config.json` and of `generation_config.json`,
    where chat models name theirs.

    Args:
      path: of `config.json`.

    Raises:
      UserError: an unknown architecture, a key missing, or a setting that this decoder
        does not have; names key and value.
    """
    values = read_json(path)
    family = _family(path, values)
    text, outer = values.get("text_config"), values
    if text is None:
        text, outer = values, {}
    if not isinstance(text, Mapping):
        raise UserError(f"{path}: text_config={_short(text)} must hold settings")
    read = _Reader(path, family, text, outer)
    try:
        return _config(read)
    except UserError as error:
        # Checks of ModelConfig do not know the file.
        named = str(error).startswith(str(path.parent))
        raise error if named else UserError(f"{path}: {error}") from None


def read_layer(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a drafter's layer.

    Args:
      path: of the file that holds it.
      values: its settings, as those of a model of one layer.

    Raises:
      UserError: as `read_config`.
    """
    kind = values.get("model_type", "llama")
    if kind not in FAMILIES:
        raise UserError(
            f"{path}: model_type={_short(kind)} is not supported, only "
            f"{', '.join(FAMILIES)}"
        )
    return _config(_Reader(path, FAMILIES[kind], values, {}))


def read_notes(path: Path) -> tuple[str, ...]:
    """What of the model in the folder of `config.json` is left out, a line each."""
    if read_json(path).get("vision_config") is None:
        return ()
    return (f"{path.parent} also reads images; its text part alone is used",)


class _Reader:
    """The settings of a folder: its own, then the family's defaults.

    Attributes:
      outer: the settings around those of the text part, or none.
    """

    def __init__(self, path: Path, family: Family, values: Mapping, outer: Mapping):
        self.path, self.family = path, family
        self.values, self.outer = values, outer
        for held in (values, outer):
            foreign.check_settings(path, held)
            for key, wanted in {**_REFUSED, **family.refused}.items():
                if held.get(key) is not None and held[key] not in wanted:
                    self.refuse(key, held[key], " or ".join(map(_short, wanted)))

    def get(self, key: str) -> Any:
        """A setting of every family; null in the file is None, whatever the default."""
        return self.values.get(key, self.family.defaults.get(key))

    def for_family(self, key: str) -> Any:
        """A setting that only some families know; the others do not look at it."""
        return self.get(key) if key in self.family.defaults else None

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(
            f"{self.path}: {key}={_short(value)} is not supported, only "
            f"{wanted or 'null'}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = self.family.defaults.get(key, default)
        if value is None:
            raise UserError(
                f"{self.path} lacks {key}, which models of family {self.family.name} "
                "need; take the config.json that belongs to the weights"
            )
        self.check(key, value, type(value) is int and value >= 1, "a whole number >= 1")
        return value

    def number(self, key: str, value: Any) -> Any:
        good = value is None or type(value) in (int, float)
        self.check(key, value, good, "a number")
        return value

    def flag(self, key: str) -> bool:
        value = self.outer.get(key, self.get(key))
        self.check(key, value, value in (None, True, False), "true or false")
        return bool(value)

    def ids(self, key: str, value: Any) -> list[int]:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        good = all(type(item) is int and item >= 0 for item in ids)
        self.check(key, value, good, "a token's number, or a list of them")
        return ids

    def check(self, key: str, value: Any, good: bool, wanted: str) -> None:
        if not good:
            raise UserError(f"{self.path}: {key}={_short(value)} must be {wanted}")


def _family(path: Path, values: Mapping[str, Any]) -> Family:
    named = values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    kind = values.get("model_type")
    for family in FAMILIES.values():
        if (not named or any(name in family.architectures for name in named)) and (
            kind in family.model_types or (named and kind is None)
        ):
            return family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    raise UserError(
        f"{path}: architectures={_short(named)} model_type={_short(kind)} is not "
        f"supported, only {', '.join(known)}"
    )


def _config(read: _Reader) -> ModelConfig:
    generation = read.path.parent / "generation_config.json"
    more = read_json(generation) if generation.is_file() else {}
    starts = read.outer.get("bos_token_id", read.get("bos_token_id"))
    starts = read.ids("bos_token_id", starts)
    ends = [
        end
        for lookup in (read.outer.get, read.get, more.get)
        for end in read.ids("eos_token_id", lookup("eos_token_id"))
    ]
    heads, width = read.size("num_attention_heads"), read.size("hidden_size")
    layers = read.size("num_hidden_layers")
    window, local = _windows(read, layers)
    positions = read.size("max_position_embeddings")
    rotary, local_rotary = _rotaries(read, positions)
    if rotary.scaling == "yarn":
        # Published settings for long texts leave the original length in place.
        stretched = math.floor(rotary.factor * rotary.original_max_positions)
        positions = max(positions, stretched)
    scale = None
    if read.for_family("query_pre_attn_scalar") is not None:
        scale = read.size("query_pre_attn_scalar") ** -0.5
    eps = read.get("rms_norm_eps")
    return ModelConfig(
        family=read.family.name,
        vocab_size=read.size("vocab_size"),
        embed_dim=width,
        mlp_dim=read.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read.size("num_key_value_heads", heads),
        head_dim=read.size("head_dim", width // heads),
        max_positions=positions,
        rotary=rotary,
        local_rotary=local_rotary if local else None,
        window=window,
        local_layers=local,
        norm_eps=1e-6 if eps is None else read.number("rms_norm_eps", eps),
        tied_embeddings=read.flag("tie_word_embeddings"),
        activation=_activation(read),
        attention_scale=scale,
        attention_soft_cap=_cap(read, "attn_logit_softcapping"),
        logit_soft_cap=_cap(read, "final_logit_softcapping"),
        bos_id=starts[0] if starts else None,
        eos_ids=tuple(dict.fromkeys(ends)),
        **read.family.fixed,
    )


def _cap(read: _Reader, key: str) -> float | None:
    return read.number(key, read.for_family(key))


def _activation(read: _Reader) -> str:
    key, known = read.family.activation_key, read.family.activations
    value = read.get(key) or read.family.defaults.get(key, "silu")
    if value not in tuple(known):
        read.refuse(key, value, " or ".join(map(_short, known)))
    return known[value]


def _windows(read: _Reader, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that it limits; None without any."""
    rule = read.family.windows
    window = read.for_family("sliding_window")
    if rule == "later" and not read.flag("use_sliding_window"):
        window = None
    if window is not None:
        read.size("sliding_window")
    local: Iterable[int] = ()
    if rule == "always" and window:
        local = range(layers)
    elif rule == "later" and window:
        # May be zero: all layers.
        first = read.for_family("max_window_layers")
        good = type(first) is int and first >= 0
        read.check("max_window_layers", first, good, "a whole number >= 0")
        local = range(first, layers)
    elif rule == "pattern":
        every = read.size("sliding_window_pattern")
        local = (i for i in range(layers) if (i + 1) % every)
    kinds = read.values.get("layer_types")
    if kinds is not None:
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(kind not in (_LOCAL, _GLOBAL) for kind in kinds)
        ):
            read.refuse("layer_types", kinds, f"{layers} times {_LOCAL} or {_GLOBAL}")
        named = [i for i, kind in enumerate(kinds) if kind == _LOCAL]
        if rule in ("never", "always") and named != list(local):
            read.refuse("layer_types", kinds, "the same for all layers of this family")
        local = named
    local = tuple(local)
    if local and window is None:
        read.refuse("sliding_window", None, f"a number, as layers are {_LOCAL}")
    return (window, local) if local else (None, ())


def _rotaries(
    read: _Reader, positions: int
) -> tuple[RotaryConfig, RotaryConfig | None]:
    """Of all layers, or of the global ones and of the local ones."""
    newer, older = "rope_parameters", "rope_scaling"
    values = read.values
    used = older if values.get(older) else newer
    added = values.get(older) or {}
    theta = read.number("rope_theta", read.get("rope_theta"))
    local_theta = read.for_family("rope_local_base_freq")
    local_theta = read.number("rope_local_base_freq", local_theta)
    if not read.family.local_rotary:
        given = _merged(read, values.get(newer), added)
        return _rotary(read, used, given, theta, positions), None
    both = values.get(newer) or {}
    if not isinstance(both, Mapping) or not set(both) <= {_LOCAL, _GLOBAL}:
        read.refuse(newer, both, f"settings for {_GLOBAL} and {_LOCAL}")
    wide = _merged(read, both.get(_GLOBAL), added)
    return (
        _rotary(read, used, wide, theta, positions),
        _rotary(read, newer, both.get(_LOCAL), local_theta, positions),
    )


def _merged(read: _Reader, values: Any, added: Any) -> Any:
    """`rope_parameters` and the `rope_scaling` beside it, as one.

    People add the latter to stretch a model; a type "default" gives way to another.
    """
    if not values or not added:
        return added or values
    for key, part in (("rope_parameters", values), ("rope_scaling", added)):
        _rotary_kind(read, key, part)
    first, second = dict(values), dict(added)
    for part in (first, second):
        kind = part.get("rope_type") or part.get("type")
        part.pop("type", None)
        part["rope_type"] = kind
        if kind in (None, "default"):
            del part["rope_type"]
    for key in first.keys() & second.keys():
        if first[key] != second[key]:
            wanted = f"rope_parameters has {_short(first[key])}; remove one of them"
            raise UserError(
                f"{read.path}: rope_scaling.{key}={_short(second[key])}, but {wanted}"
            )
    return {**first, **second}


def _rotary_kind(read: _Reader, key: str, values: Any) -> str:
    """How positions are stretched. Raises UserError if this decoder cannot."""
    kinds = f"rope_type {', '.join(_SCALINGS)}"
    if not isinstance(values, Mapping):
        read.refuse(key, values, kinds)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in _SCALINGS:
        read.refuse(key, values, kinds)
    if values.get("partial_rotary_factor") not in (None, 1.0):
        read.refuse(key, values, "partial_rotary_factor 1.0")
    if values.get("mrope_section") or any(isinstance(v, dict) for v in values.values()):
        read.refuse(key, values, "one setting for all dimensions and layers")
    return kind


def _rotary(
    read: _Reader, key: str, values: Any, theta: Any, positions: int
) -> RotaryConfig:
    values = {} if values is None else values
    kind = _rotary_kind(read, key, values)

    def optional(name: str) -> Any:
        return read.number(f"{key}.{name}", values.get(name))

    def number(name: str, default: Any = None) -> Any:
        value = optional(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{read.path}: {key}={_short(values)} lacks {name}")
        return value

    theta = number("rope_theta", 10000.0 if theta is None else theta)
    if kind == "default":
        return RotaryConfig(theta)
    if kind == "linear":
        return RotaryConfig(theta, "linear", number("factor"))
    name = "original_max_position_embeddings"
    found = (read.values.get(name), values.get(name), positions)
    original = next(value for value in found if value is not None)
    whole = type(original) is int and original >= 1
    read.check(name, original, whole, "a whole number >= 1")
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factors = {name: number(name) for name in names}
        return RotaryConfig(theta, "llama3", original_max_positions=original, **factors)
    truncate = values.get("truncate")
    return RotaryConfig(
        theta,
        "yarn",
        number("factor", positions / original),
        original,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=True if truncate is None else truncate,
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
