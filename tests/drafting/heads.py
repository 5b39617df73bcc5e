"""Random drafters over the rows of the tiny target."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from tests.conftest import TINY
from treespec_jax.models.drafter_config import EagleConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads

FEW = 41


def eagle(target, generation: int, few: bool = False) -> EagleModel:
    """Of the target's embedding and head; `few`: of some of its tokens."""
    vocab = FEW if few else TINY.vocab_size
    config = EagleConfig(
        generation=generation,
        layer=dataclasses.replace(TINY, num_layers=1, vocab_size=vocab),
        target_vocab=TINY.vocab_size,
        target_dim=TINY.embed_dim,
        feature_layers=(TINY.num_layers,) if generation == 1 else (0, 1, 2),
    )
    model = EagleModel(config, rngs=nnx.Rngs(generation))
    model.embedding[...] = target.embedding[...]
    return _headed(model, target)


def medusa(target, heads: int = 3, few: bool = False) -> MedusaHeads:
    """Heads over the target's head."""
    config = MedusaConfig(
        heads=heads,
        blocks=1,
        target_dim=TINY.embed_dim,
        target_vocab=TINY.vocab_size,
        vocab_size=FEW if few else TINY.vocab_size,
        target_layers=TINY.num_layers,
    )
    model = MedusaHeads(config, rngs=nnx.Rngs(7))
    return _headed(model, target)


def _headed(model, target):
    head = target.head[...]
    if model.config.reduced:
        ids = jnp.arange(FEW, dtype=jnp.int32) * 2 + 1
        model.token_ids[...] = ids
        head = head[ids]
    model.head[...] = head
    return model
