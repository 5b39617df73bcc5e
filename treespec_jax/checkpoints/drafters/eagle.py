"""EAGLE's layers as they are published; free of jax.

A folder with `config.json` and safetensors files or `pytorch_model.bin`. Sources:
SafeAILab/EAGLE (`cnets1.py`, `cnets.py`), vllm-project/speculators (`models/eagle3`),
and how vLLM and SGLang read them. What publishers do not write down is in `PUBLISHERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.drafters.description import (
    DrafterDescription,
    Target,
    with_options,
)
from treespec_jax.checkpoints.files import read_json
from treespec_jax.checkpoints.formats.huggingface_config import read_layer
from treespec_jax.checkpoints.pieces import Piece, Tensors, TensorSource
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.checkpoints.torch_file import TorchFile
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, EagleOptions

CONFIG, BIN = "config.json", "pytorch_model.bin"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclasses.dataclass(frozen=True)
class Publisher:
    """Who writes a kind of file, and what it takes for granted.

    Attributes:
      generation: of `EagleConfig`.
      prefix: of the layer's tensors.
      nested: key of `config.json` that holds the layer's settings; "": the top.
      default_layers: layers whose inputs are read where the file names none; n is the
        target's number of layers. None: the output of the target's final norm is.
      norm_before_residual: where the file does not say.
    """

    generation: int
    prefix: str
    nested: str = ""
    default_layers: str | None = None
    norm_before_residual: bool = False


PUBLISHERS = {
    "EAGLE-1 or 2": Publisher(1, "layers.0"),
    "EAGLE-3": Publisher(3, "midlayer", default_layers="2, n/2, n-3"),
    # SpecForge and others write EAGLE-3 with the names of `layers`.
    "EAGLE-3 (layers)": Publisher(3, "layers.0", default_layers="2, n/2, n-3"),
    "speculators": Publisher(
        3, "layers.0", "transformer_layer_config", default_layers="2, n/2, n-3"
    ),
}
# Of the layer ids that files name: by how much they exceed the number of the layer
# whose output is meant. vLLM and speculators, who write the key at the top, name the
# layer that reads the row; SGLang and SpecForge, who nest it, the layer that writes it.
_TOP, _NESTED = 1, 0
# Settings that change what the layer computes; null and a missing key are always right.
_REFUSED: dict[str, tuple] = {
    "norm_output": (False,),
    "parallel_drafting": (False,),
    "logit_scale": (1, 1.0),
}


class PublishedEagle:
    """See `DrafterFormat`."""

    def method(self, path: Path) -> str:
        file = path / CONFIG
        if not file.is_file():
            return ""
        values = read_json(file)
        named = values.get("architectures") or []
        says = any("eagle" in str(name).lower() for name in named)
        keys = {"speculators_model_type", "transformer_layer_config"}
        if says or (keys | {"draft_vocab_size"}) & set(values):
            return "eagle"
        if values.get("num_hidden_layers") != 1:
            return ""
        # The first ones call themselves a Llama of one layer.
        try:
            return "eagle" if "fc.weight" in _open(path).shapes() else ""
        except UserError:
            return ""

    def describe(
        self, path: Path, target: Target, options: EagleOptions
    ) -> DrafterDescription:
        values = read_json(path / CONFIG)
        source = _open(path)
        shapes = source.shapes()
        who = _publisher(path, values, shapes)
        config = _config(path / CONFIG, values, shapes, who)
        layers = options.feature_layers or _layers(
            path / CONFIG, values, who, target.config.num_layers
        )
        config = dataclasses.replace(config, feature_layers=layers)
        config = with_options(config, options)
        notes = []
        about = PUBLISHERS[who]
        said = "norm_before_residual" in values
        if about.nested and not said and options.norm_before_residual is None:
            notes.append(
                f"{path / CONFIG} does not say norm_before_residual; "
                f"{about.norm_before_residual} is assumed"
            )
        return DrafterDescription(
            "eagle", config, path, self, source.dtype, tuple(notes)
        )

    def open(self, description: DrafterDescription) -> Tensors:
        source = _open(description.path)
        names, config = source.shapes(), description.config
        prefix = _prefix(names)
        ignored = [name for name in names if _is_useless(name)]
        return Tensors(source, name_table(config, prefix), ignored)

    def token_ids(self, description: DrafterDescription) -> np.ndarray:
        source, config = _open(description.path), description.config
        shapes = source.shapes()
        if shapes.get("d2t") != (config.draft_vocab,):
            raise UserError(
                f"{source.path}: tensor d2t [{config.draft_vocab}] is missing, which "
                "says what tokens the drafter knows; the file is incomplete"
            )
        ids = np.arange(config.draft_vocab) + _whole(source, "d2t").astype(np.int64)
        if shapes.get("t2d") == (config.target_vocab,):
            known = np.flatnonzero(_whole(source, "t2d"))
            if not np.array_equal(known, ids):
                raise UserError(
                    f"{source.path}: d2t and t2d name different tokens; the file is "
                    "damaged, or d2t holds no offsets"
                )
        return ids


def name_table(config: EagleConfig, prefix: str) -> list[Piece]:
    """Where every tensor goes.

    Args:
      config: what of it is the target's has no tensor.
      prefix: of the layer's tensors.
    """
    layer, third = config.layer, config.generation == 3
    D, F, H, W = layer.embed_dim, layer.mlp_dim, layer.head_dim, config.target_dim
    G, K, every = layer.queries_per_kv, layer.num_kv_heads, slice(None)
    features = len(config.feature_layers) * W
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    pieces = [
        Piece("fc.weight", (D, features if third else D + W), "fc"),
        Piece(f"{attention}.o_proj.weight", (D, G * K * H), "attention.out"),
        Piece(f"{mlp}.gate_proj.weight", (F, D), "mlp.gate_up", (0,)),
        Piece(f"{mlp}.up_proj.weight", (F, D), "mlp.gate_up", (1,)),
        Piece(f"{mlp}.down_proj.weight", (D, F), "mlp.down"),
    ]
    norms = {f"{prefix}.post_attention_layernorm": ("mlp_norm", D)}
    inputs = f"{prefix}.input_layernorm"
    if third:
        norms[inputs] = "embed_norm", D
        norms[f"{prefix}.hidden_norm"] = "hidden_norm", D
        norms["norm"] = "norm", D
    elif config.input_norm:
        norms[inputs] = "attention_norm", D
    if config.norm_before_fc == "all":
        norms["input_norm"] = "fc_norms.0", features
    elif config.norm_before_fc == "each":
        for i in range(len(config.feature_layers)):
            norms[f"fc_norm.{i}"] = f"fc_norms.{i}", W
    if layer.qk_norm:
        for name in ("q_norm", "k_norm"):
            norms[f"{attention}.{name}"] = f"attention.{name}", H
    for name, (norm, size) in norms.items():
        pieces.append(Piece(f"{name}.weight", (size,), f"{norm}.scale"))
    parts = [("q", G * K * H, slice(G)), ("k", K * H, G), ("v", K * H, G + 1)]
    for name, rows, part in parts:
        at, width = (every, part), 2 * D if third else D
        projection = f"{attention}.{name}_proj"
        pieces.append(Piece(f"{projection}.weight", (rows, width), "attention.qkv", at))
        if layer.qkv_bias:
            pieces.append(
                Piece(f"{projection}.bias", (rows,), "attention.qkv_bias", at)
            )
    if config.fc_bias:
        pieces.append(Piece("fc.bias", (D,), "fc_bias"))
    if not config.shared_embedding:
        shape = config.target_vocab, D
        pieces.append(Piece("embed_tokens.weight", shape, "embedding"))
    if not config.shared_head:
        pieces.append(Piece("lm_head.weight", (config.draft_vocab, D), "head"))
    return pieces


def _publisher(path: Path, values: Mapping[str, Any], names: Collection[str]) -> str:
    """The row of `PUBLISHERS` that a folder follows."""
    for held in (values, values.get("eagle_config") or {}):
        for key, wanted in _REFUSED.items():
            if held.get(key) is not None and held[key] not in wanted:
                raise UserError(
                    f"{path / CONFIG}: {key}={held[key]!r} is not supported; take "
                    "another drafter"
                )
    kind = values.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise UserError(
            f"{path / CONFIG}: speculators_model_type={kind!r} is not supported, only "
            "eagle3"
        )
    prefix = _prefix(names)
    third = f"{prefix}.hidden_norm.weight" in names
    if kind is not None or PUBLISHERS["speculators"].nested in values:
        return "speculators"
    if third:
        return "EAGLE-3" if prefix == "midlayer" else "EAGLE-3 (layers)"
    return "EAGLE-1 or 2"


def _config(
    file: Path,
    values: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    who: str,
) -> EagleConfig:
    """All but the feature layers, for which the target's last stands."""
    about = PUBLISHERS[who]
    settings = values.get(about.nested) if about.nested else values
    if not isinstance(settings, Mapping):
        raise UserError(f"{file}: {about.nested} must hold the layer's settings")
    layer = read_layer(file, settings)
    if layer.num_layers != 1:
        raise UserError(
            f"{file}: num_hidden_layers={layer.num_layers} is not supported, only 1"
        )
    prefix, vocab = _prefix(shapes), layer.vocab_size
    attention = f"{prefix}.self_attn"
    layer = dataclasses.replace(
        layer,
        vocab_size=values.get("draft_vocab_size") or vocab,
        window=None,
        local_layers=(),
        local_rotary=None,
        # Families that have these have drafters without.
        qkv_bias=f"{attention}.q_proj.bias" in shapes,
        qk_norm=f"{attention}.q_norm.weight" in shapes,
    )
    third, before = about.generation == 3, ""
    if third and "fc_norm.0.weight" in shapes:
        before = "each"
    elif third and ("input_norm.weight" in shapes or values.get("norm_before_fc")):
        before = "all"
    key = "norm_before_residual"
    return EagleConfig(
        generation=about.generation,
        layer=layer,
        target_vocab=vocab,
        target_dim=values.get("target_hidden_size") or layer.embed_dim,
        feature_layers=(0,),
        shared_embedding="embed_tokens.weight" not in shapes,
        shared_head="lm_head.weight" not in shapes,
        input_norm=not third and f"{prefix}.input_layernorm.weight" in shapes,
        fc_bias="fc.bias" in shapes,
        norm_before_fc=before,
        norm_before_residual=third and values.get(key, about.norm_before_residual),
    )


def _layers(
    file: Path, values: Mapping[str, Any], who: str, count: int
) -> Sequence[int]:
    """Numbers of the target's layers, of `count`, whose outputs are read."""
    if PUBLISHERS[who].default_layers is None:
        return (count,)
    top, nested = values.get(_LAYER_IDS), values.get("eagle_config") or {}
    ids, excess = (2, count // 2, count - 3), 1
    if top:
        ids, excess = top, _TOP
    elif nested.get(_LAYER_IDS):
        ids, excess = nested[_LAYER_IDS], _NESTED
    if not isinstance(ids, Sequence) or not all(type(i) is int for i in ids):
        raise UserError(f"{file}: {_LAYER_IDS}={ids!r} must be a list of numbers")
    layers = [index - excess for index in ids]
    if layers != sorted(set(layers)) or layers[0] < 0:
        raise UserError(
            f"{file}: the drafter reads the outputs of layers {layers}, which a target "
            f"of {count} layers does not have in that order; name others with the "
            "option feature_layers"
        )
    return layers


def _prefix(names: Collection[str]) -> str:
    found = any(name.startswith("midlayer.") for name in names)
    return "midlayer" if found else "layers.0"


def _is_useless(name: str) -> bool:
    """Whether a tensor holds what is known without it, or of the target."""
    if name in ("d2t", "t2d") or name.startswith("verifier_"):
        return True
    return name.endswith("rotary_emb.inv_freq")


def _open(path: Path) -> TensorSource:
    if any(path.glob("*.safetensors")) or not (path / BIN).is_file():
        return SafetensorsSource(path)
    return TorchFile(path / BIN)


def _whole(source: TensorSource, name: str) -> np.ndarray:
    shape = source.shapes()[name]
    return source.read(name, tuple(slice(0, size) for size in shape))
