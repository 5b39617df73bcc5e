"""Model families of Hugging Face: the names of their tensors, as data; free of jax.

A family is a row of `FAMILIES`. What its models compute is in `ModelConfig`, so that
one name table, by configuration, serves all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from treespec_jax.checkpoints.pieces import Piece
from treespec_jax.config import ModelConfig

SILU = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets the models of one `model_type` apart.

    Attributes:
      name: `ModelConfig.family`.
      architectures: of `config.json` that are of this family.
      model_types: the same of `model_type`; empty: the name alone.
      fixed: fields of `ModelConfig` that all its models have in common.
      defaults: of `config.json`, as transformers has them; sizes that are not here are
        required.
      windows: which layers are limited to `sliding_window` where `layer_types` does not
        say: "never", "always", "later" (from `max_window_layers` on, if
        `use_sliding_window`) or "pattern" (all but every `sliding_window_pattern`-th).
      local_rotary: whether the limited layers have rotary settings of their own.
      activation_key: of `config.json`.
      activations: its values, and what `ModelConfig.activation` calls them.
      refused: keys of `config.json` that must be missing, null or one of these values.
      roots: prefixes that the decoder's tensors may have; the first that is there wins.
      heads: prefixes of an output head of its own.
      unused: prefixes of the tensors of parts that read images.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: str = "never"
    local_rotary: bool = False
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: SILU)
    refused: Mapping[str, tuple] = dataclasses.field(
        default_factory=lambda: {"attention_bias": (False,)}
    )
    roots: tuple[str, ...] = ("model",)
    heads: tuple[str, ...] = ("lm_head",)
    unused: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.model_types:
            object.__setattr__(self, "model_types", (self.name,))


_GEMMA = dict(scaled_embeddings=True, unit_offset_norms=True)
_GEMMA_DEFAULTS = dict(
    tie_word_embeddings=True,
    head_dim=256,
    bos_token_id=2,
    eos_token_id=1,
    rms_norm_eps=1e-6,
)
_GEMMA_CAUSAL = {
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
}
_QWEN_DEFAULTS = dict(
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
FAMILIES = {
    family.name: family
    for family in [
        Family(
            "llama",
            ("LlamaForCausalLM",),
            defaults=dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
        ),
        Family(
            "mistral",
            ("MistralForCausalLM",),
            defaults=dict(
                max_position_embeddings=131072,
                num_key_value_heads=8,
                sliding_window=4096,
                bos_token_id=1,
                eos_token_id=2,
            ),
            windows="always",
        ),
        Family(
            "qwen2",
            ("Qwen2ForCausalLM",),
            fixed=dict(qkv_bias=True),
            defaults=_QWEN_DEFAULTS,
            windows="later",
            refused={},
        ),
        Family(
            "qwen3",
            ("Qwen3ForCausalLM",),
            fixed=dict(qk_norm=True),
            defaults=dict(_QWEN_DEFAULTS, head_dim=128),
            windows="later",
        ),
        Family(
            "gemma",
            ("GemmaForCausalLM",),
            fixed=_GEMMA,
            defaults=dict(
                _GEMMA_DEFAULTS,
                max_position_embeddings=8192,
                num_key_value_heads=16,
                hidden_act="gelu_pytorch_tanh",
            ),
            # The first files say "gelu" and mean its approximation by tanh.
            activations={"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
            refused=dict(_GEMMA_CAUSAL, hidden_activation=("gelu_pytorch_tanh",)),
        ),
        Family(
            "gemma2",
            ("Gemma2ForCausalLM",),
            fixed=dict(_GEMMA, post_norms=True),
            defaults=dict(
                _GEMMA_DEFAULTS,
                max_position_embeddings=8192,
                num_key_value_heads=4,
                hidden_activation="gelu_pytorch_tanh",
                query_pre_attn_scalar=256,
                sliding_window=4096,
                sliding_window_pattern=2,
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
            ),
            windows="pattern",
            activation_key="hidden_activation",
            refused=_GEMMA_CAUSAL,
        ),
        Family(
            "gemma3",
            ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            model_types=("gemma3_text", "gemma3"),
            fixed=dict(_GEMMA, post_norms=True, qk_norm=True),
            defaults=dict(
                _GEMMA_DEFAULTS,
                # Published multimodal files leave out what equals these.
                vocab_size=262208,
                hidden_size=2304,
                intermediate_size=9216,
                num_hidden_layers=26,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=131072,
                hidden_activation="gelu_pytorch_tanh",
                query_pre_attn_scalar=256,
                sliding_window=4096,
                sliding_window_pattern=6,
                final_logit_softcapping=None,
                rope_theta=1e6,
                rope_local_base_freq=1e4,
            ),
            windows="pattern",
            local_rotary=True,
            activation_key="hidden_activation",
            # transformers reads this cap for Gemma 3 and then does not use it.
            refused=dict(_GEMMA_CAUSAL, attn_logit_softcapping=()),
            roots=("model", "language_model.model", "model.language_model"),
            heads=("lm_head", "language_model.lm_head"),
            unused=tuple(
                f"{root}{part}."
                for root in ("", "model.")
                for part in ("vision_tower", "multi_modal_projector")
            ),
        ),
    ]
}


@dataclasses.dataclass(frozen=True)
class NameTable:
    """Where a checkpoint's tensors go.

    Attributes:
      pieces: every tensor's place; together they fill every parameter.
      ignored: names of tensors that are there and of no use.
    """

    pieces: list[Piece]
    ignored: list[str]


def name_table(config: ModelConfig, names: Collection[str]) -> NameTable:
    """The table of a configuration's family.

    Args:
      config: as `read_config` made it.
      names: of the tensors in the checkpoint; published files of one family may differ
        in prefixes and in tensors of no use.
    """
    family = FAMILIES[config.family]
    embedding = "embed_tokens.weight"
    root = next(
        (root for root in family.roots if f"{root}.{embedding}" in names),
        family.roots[0],
    )
    heads = [f"{head}.weight" for head in family.heads]
    pieces = [
        Piece(
            f"{root}.{embedding}", (config.vocab_size, config.embed_dim), "embedding"
        ),
        *(
            piece
            for i in range(config.num_layers)
            for piece in _layer(config, f"{root}.layers.{i}", f"layers.{i}")
        ),
        Piece(f"{root}.norm.weight", (config.embed_dim,), "norm.scale"),
    ]
    useless = {
        f"{root}.layers.{i}.self_attn.rotary_emb.inv_freq"
        for i in range(config.num_layers)
    }
    if config.tied_embeddings:
        useless.update(heads)
    else:
        head = next((head for head in heads if head in names), heads[0])
        pieces.append(Piece(head, (config.vocab_size, config.embed_dim), "head"))
    unused = {name for name in names if name.startswith(family.unused)}
    return NameTable(pieces, sorted(unused | useless.intersection(names)))


def _layer(config: ModelConfig, prefix: str, path: str) -> list[Piece]:
    """One layer. Weights are [out, in]; rotary pairs are half-split."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    G, K = config.queries_per_kv, config.num_kv_heads
    every = slice(None)
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qkv, gate_up = f"{path}.attention.qkv", f"{path}.mlp.gate_up"
    parts = [("q", G * K * H, slice(G)), ("k", K * H, G), ("v", K * H, G + 1)]
    norms = ["attention_norm", "mlp_norm"]
    theirs = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms = ["attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"]
        theirs += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    pieces = [
        Piece(f"{prefix}.{name}.weight", (D,), f"{path}.{norm}.scale")
        for name, norm in zip(theirs, norms, strict=True)
    ]
    for name, rows, part in parts:
        projection = f"{attention}.{name}_proj"
        pieces.append(Piece(f"{projection}.weight", (rows, D), qkv, (every, part)))
        if config.qkv_bias:
            bias = f"{path}.attention.qkv_bias"
            pieces.append(Piece(f"{projection}.bias", (rows,), bias, (every, part)))
    if config.qk_norm:
        pieces += [
            Piece(f"{attention}.{name}.weight", (H,), f"{path}.attention.{name}.scale")
            for name in ("q_norm", "k_norm")
        ]
    return pieces + [
        Piece(f"{attention}.o_proj.weight", (D, G * K * H), f"{path}.attention.out"),
        Piece(f"{mlp}.gate_proj.weight", (F, D), gate_up, (0,)),
        Piece(f"{mlp}.up_proj.weight", (F, D), gate_up, (1,)),
        Piece(f"{mlp}.down_proj.weight", (D, F), f"{path}.mlp.down"),
    ]


def parameter_count(config: ModelConfig) -> int:
    """Parameters of a model, without making one."""
    return sum(math.prod(piece.shape) for piece in name_table(config, ()).pieces)
