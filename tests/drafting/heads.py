"""Random drafters over the rows of tiny targets."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.drafter_config import EagleConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads

# Tokens that a drafter knows of the tiny target: every second one, from 1 on.
FEW = 41


def eagle(target, generation: int, few: bool = False) -> EagleModel:
    """Of the target's embedding and head; `few`: of some of its tokens."""
    sizes = target.config
    layers = tuple(range(sizes.num_layers + 1))
    config = EagleConfig(
        generation=generation,
        layer=dataclasses.replace(
            sizes, num_layers=1, vocab_size=_known(sizes.vocab_size, few)
        ),
        target_vocab=sizes.vocab_size,
        target_dim=sizes.embed_dim,
        feature_layers=layers[-1:] if generation == 1 else layers,
    )
    model = EagleModel(config, rngs=nnx.Rngs(generation))
    model.embedding[...] = target.embedding[...]
    return _headed(model, target)


def medusa(
    target, heads: int = 3, few: bool = False, reads_root: bool = False
) -> MedusaHeads:
    """Heads over the target's head."""
    sizes = target.config
    config = MedusaConfig(
        heads=heads,
        blocks=1,
        target_dim=sizes.embed_dim,
        target_vocab=sizes.vocab_size,
        vocab_size=_known(sizes.vocab_size, few),
        target_layers=sizes.num_layers,
        reads_root=reads_root,
    )
    model = MedusaHeads(config, rngs=nnx.Rngs(7))
    if reads_root:
        shape = model.root_weight[...].shape
        model.root_weight[...] = jax.random.normal(jax.random.key(7), shape)
        model.embedding[...] = target.embedding[...]
    return _headed(model, target)


def _known(vocab: int, few: bool) -> int:
    return min(FEW, vocab // 2) if few else vocab


def _headed(model, target):
    head = target.head[...]
    if model.config.reduced:
        ids = jnp.arange(model.config.draft_vocab, dtype=jnp.int32) * 2 + 1
        model.token_ids[...] = ids
        head = head[ids]
    model.head[...] = head
    return model
