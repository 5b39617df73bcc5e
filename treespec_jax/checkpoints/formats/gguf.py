"""GGUF files: weights, configuration, tokenizer and chat template in one."""

from __future__ import annotations

import functools
from pathlib import Path

from treespec_jax.checkpoints.formats.gguf_config import ROTARY_FACTORS, read_config
from treespec_jax.checkpoints.formats.protocol import Description
from treespec_jax.checkpoints.gguf_source import (
    GgufSource,
    Header,
    is_gguf,
    read_header,
)
from treespec_jax.checkpoints.pieces import Piece, Tensors
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.checkpoints.tokenizers.gguf import make_tokenizer, read_notes
from treespec_jax.config import ModelConfig


class GgufFormat:
    """See `Format`."""

    expects = "a .gguf file (llama.cpp)"
    tokenizer_chosen = False

    def claims(self, path: Path) -> bool:
        # Some programs keep such files under names without an ending.
        return path.is_file() and (path.suffix == ".gguf" or is_gguf(path))

    def describe(self, path: Path) -> Description:
        header = read_header(path)
        config, dtype = read_config(header), GgufSource(path).dtype
        notes = read_notes(header.metadata, str(path))
        return Description(config, None, path, self, dtype, notes)

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        return _tokenizer(read_header(path))

    def open(self, description: Description) -> Tensors:
        config = description.config
        ignored = (ROTARY_FACTORS,) if config.family == "llama" else ()
        return Tensors(GgufSource(description.path), name_table(config), ignored)


# A command describes its target and its drafter twice: before jax starts, and to load.
@functools.lru_cache(maxsize=2)
def _tokenizer(header: Header) -> Tokenizer | None:
    return make_tokenizer(header.metadata, str(header.path))


def name_table(config: ModelConfig) -> list[Piece]:
    """Every tensor's place.

    Weights are [out, in]. Of the architecture "llama", and of no other, the rows of
    queries and keys are interleaved rotary pairs. Norms that multiply by 1 + w are
    stored as that.
    """
    table = config.vocab_size, config.embed_dim
    pieces = [Piece("token_embd.weight", table, "embedding")]
    for i in range(config.num_layers):
        pieces += _layer(config, f"blk.{i}", f"layers.{i}")
    pieces.append(_norm(config, "output_norm.weight", config.embed_dim, "norm"))
    if not config.tied_embeddings:
        pieces.append(Piece("output.weight", table, "head"))
    return pieces


def _norm(config: ModelConfig, name: str, size: int, path: str) -> Piece:
    offset = config.unit_offset_norms
    return Piece(name, (size,), f"{path}.scale", unit_offset=offset)


def _layer(config: ModelConfig, prefix: str, path: str) -> list[Piece]:
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    G, K = config.queries_per_kv, config.num_kv_heads
    every = slice(None)
    attention, gate_up = f"{path}.attention", f"{path}.mlp.gate_up"
    norms = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
    if config.post_norms:
        norms |= {"post_attention_norm": "attention_post_norm"}
        norms |= {"post_ffw_norm": "mlp_post_norm"}
    pieces = [
        _norm(config, f"{prefix}.{name}.weight", D, f"{path}.{norm}")
        for name, norm in norms.items()
    ]
    for name, rows, part in (
        ("attn_q", G * K * H, slice(G)),
        ("attn_k", K * H, G),
        ("attn_v", K * H, G + 1),
    ):
        paired = config.family == "llama" and name != "attn_v"
        weight, index = f"{prefix}.{name}.weight", (every, part)
        pieces.append(Piece(weight, (rows, D), f"{attention}.qkv", index, paired))
        if config.qkv_bias:
            bias = f"{attention}.qkv_bias"
            pieces.append(Piece(f"{prefix}.{name}.bias", (rows,), bias, index))
    if config.qk_norm:
        pieces += [
            _norm(config, f"{prefix}.attn_{name}.weight", H, f"{attention}.{name}")
            for name in ("q_norm", "k_norm")
        ]
    return pieces + [
        Piece(f"{prefix}.attn_output.weight", (D, G * K * H), f"{attention}.out"),
        Piece(f"{prefix}.ffn_gate.weight", (F, D), gate_up, (0,)),
        Piece(f"{prefix}.ffn_up.weight", (F, D), gate_up, (1,)),
        Piece(f"{prefix}.ffn_down.weight", (D, F), f"{path}.mlp.down"),
    ]
