"""A new drafter for a target, before training."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads
from treespec_jax.models.transformer import Transformer
from treespec_jax.training.answers import MaskedRows
from treespec_jax.training.drafter_settings import DrafterTraining, ShapeConfig

# What a family adds to the decoder and a drafter can do without.
_PLAIN = dict(
    window=None,
    local_layers=(),
    local_rotary=None,
    qk_norm=False,
    qkv_bias=False,
    post_norms=False,
    attention_soft_cap=None,
    logit_soft_cap=None,
)


def make_head(config: DrafterTraining, target: Transformer, rows: MaskedRows):
    """A drafter of random parameters that shares what it can with its target.

    Args:
      config: of the run.
      target: with weights.
      rows: of which the commonest tokens are known to it.
    """
    ids = commonest(rows, config.drafter.vocab, target.config.vocab_size)
    rngs, dtype = nnx.Rngs(config.seed), jnp.float32
    if config.method == "medusa":
        about = medusa_config(config.drafter, target.config, len(ids))
        head = MedusaHeads(about, dtype=dtype, rngs=rngs)
    else:
        generation = 3 if config.method == "eagle3" else 1
        about = eagle_config(config.drafter, target.config, generation, len(ids))
        head = EagleModel(about, dtype=dtype, rngs=rngs)
    if about.shared_embedding:
        head.embedding[...] = target.embedding[...]
    table = target.embedding if target.config.tied_embeddings else target.head
    if about.reduced:
        head.token_ids[...] = jnp.asarray(ids, jnp.int32)
        known_VD = table[...][jnp.asarray(ids)]
    else:
        known_VD = table[...]
    if config.method == "medusa":
        known_VD = jnp.broadcast_to(known_VD, head.head[...].shape)
    head.head[...] = known_VD if about.shared_head else known_VD.astype(dtype)
    return head


def make_draft_model(config: DrafterTraining, target: Transformer) -> Transformer:
    """A language model of random parameters and the target's vocabulary.

    Args:
      config: of the run.
      target: whose tokens and positions it has.

    Raises:
      UserError: a reduced vocabulary, or sizes that do not go together.
    """
    if config.drafter.vocab not in (0, target.config.vocab_size):
        raise UserError(
            f"drafter.vocab={config.drafter.vocab}: a draft model has all "
            f"{target.config.vocab_size} tokens of the target; leave it out"
        )
    about = draft_config(config.drafter, target.config)
    return Transformer(about, dtype=jnp.float32, rngs=nnx.Rngs(config.seed))


def commonest(rows: MaskedRows, count: int, vocab: int) -> np.ndarray:
    """int64 [Vd], ascending: the commonest tokens that the target wrote.

    Raises:
      UserError: more than there are.
    """
    if count > vocab:
        raise UserError(
            f"drafter.vocab={count} exceeds the target's {vocab} tokens; lower it"
        )
    if not count or count == vocab:
        return np.arange(vocab)
    written = rows.tokens[rows.written]
    counts = np.bincount(written, minlength=vocab)
    # Of tokens that are equally common, the first.
    best = np.argsort(-counts, kind="stable")[:count]
    return np.sort(best)


def eagle_config(
    shape: ShapeConfig, target: ModelConfig, generation: int, vocab: int
) -> EagleConfig:
    """The shape of an EAGLE layer for a target of that configuration."""
    layers = shape.feature_layers
    if layers is None:
        n = target.num_layers
        deep = {min(1, n), max(0, n // 2 - 1), max(0, n - 4)}
        layers = (n,) if generation == 1 else tuple(sorted(deep))
    if layers[0] < 0 or layers[-1] > target.num_layers:
        raise UserError(
            f"drafter.feature_layers={list(layers)} is outside 0..{target.num_layers}, "
            "the target's layers"
        )
    layer = dataclasses.replace(
        target,
        vocab_size=vocab,
        num_layers=1,
        mlp_dim=shape.mlp_dim or target.mlp_dim,
        num_heads=shape.num_heads or target.num_heads,
        num_kv_heads=shape.num_kv_heads or target.num_kv_heads,
        head_dim=shape.head_dim or target.head_dim,
        **_PLAIN,
    )
    return EagleConfig(
        generation=generation,
        layer=layer,
        target_vocab=target.vocab_size,
        target_dim=target.embed_dim,
        feature_layers=layers,
        shared_head=shape.shared_head,
    )


def medusa_config(shape: ShapeConfig, target: ModelConfig, vocab: int) -> MedusaConfig:
    """The shape of Medusa heads for a target of that configuration."""
    return MedusaConfig(
        heads=shape.heads,
        blocks=shape.blocks,
        target_dim=target.embed_dim,
        target_vocab=target.vocab_size,
        vocab_size=vocab,
        target_layers=target.num_layers,
        shared_head=shape.shared_head,
        reads_root=shape.reads_root,
    )


def draft_config(shape: ShapeConfig, target: ModelConfig) -> ModelConfig:
    """The shape of a draft model for a target of that configuration.

    What `shape` leaves open is half of the target's, the width of a head the target's.
    """
    kv_heads = shape.num_kv_heads or max(1, target.num_kv_heads // 2)
    return dataclasses.replace(
        target,
        embed_dim=shape.embed_dim or -(-target.embed_dim // 2),
        mlp_dim=shape.mlp_dim or -(-target.mlp_dim // 2),
        num_layers=shape.num_layers,
        num_heads=shape.num_heads or kv_heads * target.queries_per_kv,
        num_kv_heads=kv_heads,
        head_dim=shape.head_dim or target.head_dim,
        tied_embeddings=True,
        scaled_embeddings=False,
        unit_offset_norms=False,
        attention_scale=None,
        **_PLAIN,
    )
