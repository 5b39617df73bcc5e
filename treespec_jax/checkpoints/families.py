"""Model families of Hugging Face: `config.json` and the names of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import read_json
from treespec_jax.checkpoints.pieces import Piece
from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError


def llama_config(path: Path) -> ModelConfig:
    """Reads `config.json` of a Llama folder.

    Tokens that end a text are those of `config.json` and of `generation_config.json`,
    where chat models name theirs.

    Raises:
      UserError: another architecture, a key missing, or a setting that this decoder
        does not have; names key and value.
    """
    values = read_json(path)
    _check_family(path, values)
    for key, wanted in {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1.0),
    }.items():
        found = values.get(key, wanted[0])
        harmless = key == "rope_scaling" and _plain_rotary(found)
        if found not in wanted and not harmless:
            raise UserError(
                f"{path}: {key}={_short(found)} is not supported, only "
                f"{' or '.join(_short(value) for value in wanted)}"
            )
    rotary = values.get("rope_parameters") or {}
    if rotary and not _plain_rotary(rotary):
        raise UserError(
            f"{path}: rope_parameters={_short(rotary)} is not supported, only "
            'rope_type "default"'
        )

    def size(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{path}: {key}={_short(value)} must be a whole number >= 1"
            )
        return value

    heads, width = size("num_attention_heads"), size("hidden_size")
    generation = path.parent / "generation_config.json"
    more = read_json(generation) if generation.is_file() else {}
    eos = _ids(values.get("eos_token_id", 2)) + _ids(more.get("eos_token_id"))
    bos = _ids(values.get("bos_token_id", 1))
    return ModelConfig(
        vocab_size=size("vocab_size"),
        embed_dim=width,
        mlp_dim=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", width // heads),
        max_positions=size("max_position_embeddings", 2048),
        rotary=RotaryConfig(
            rotary.get("rope_theta", values.get("rope_theta", 10000.0))
        ),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
    )


def llama_table(config: ModelConfig) -> list[Piece]:
    """Every tensor's place. Weights are [out, in]; rotary pairs are half-split."""
    c = config
    D, F, G = c.embed_dim, c.mlp_dim, c.queries_per_kv
    rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    every = slice(None)
    pieces = [Piece("model.embed_tokens.weight", (c.vocab_size, D), "embedding")]
    for i in range(c.num_layers):
        here, at = f"model.layers.{i}", f"layers.{i}"
        attention, mlp = f"{here}.self_attn", f"{here}.mlp"
        qkv, gate_up = f"{at}.attention.qkv", f"{at}.mlp.gate_up"
        norms = f"{here}.input_layernorm.weight", f"{here}.post_attention_layernorm"
        pieces += [
            Piece(norms[0], (D,), f"{at}.attention_norm.scale"),
            Piece(f"{attention}.q_proj.weight", (rows, D), qkv, (every, slice(G))),
            Piece(f"{attention}.k_proj.weight", (kv_rows, D), qkv, (every, G)),
            Piece(f"{attention}.v_proj.weight", (kv_rows, D), qkv, (every, G + 1)),
            Piece(f"{attention}.o_proj.weight", (D, rows), f"{at}.attention.out"),
            Piece(f"{norms[1]}.weight", (D,), f"{at}.mlp_norm.scale"),
            Piece(f"{mlp}.gate_proj.weight", (F, D), gate_up, (0,)),
            Piece(f"{mlp}.up_proj.weight", (F, D), gate_up, (1,)),
            Piece(f"{mlp}.down_proj.weight", (D, F), f"{at}.mlp.down"),
        ]
    pieces.append(Piece("model.norm.weight", (D,), "norm.scale"))
    if not c.tied_embeddings:
        pieces.append(Piece("lm_head.weight", (c.vocab_size, D), "head"))
    return pieces


def llama_ignored(config: ModelConfig) -> list[str]:
    """Tensors that older files hold and nothing reads."""
    names = [
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        for i in range(config.num_layers)
    ]
    return names + ["lm_head.weight"] * config.tied_embeddings


def _check_family(path: Path, values: Mapping[str, Any]) -> None:
    named = values.get("architectures") or []
    family = values.get("model_type")
    if family != "llama" and "LlamaForCausalLM" not in named:
        raise UserError(
            f"{path}: architectures={_short(named)} model_type={_short(family)} is not "
            "supported, only LlamaForCausalLM"
        )


def _plain_rotary(value: Any) -> bool:
    """Whether a rotary setting is a dictionary that asks for no scaling."""
    if not isinstance(value, Mapping):
        return False
    kind = value.get("rope_type", value.get("type", "default"))
    return kind == "default" and value.get("partial_rotary_factor", 1.0) == 1.0


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
