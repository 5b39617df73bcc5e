"""A tiny target as a checkpoint, and drafters over its rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.conftest import TINY
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.models.drafter_config import EagleConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads

IDS = np.sort(np.random.default_rng(5).permutation(TINY.vocab_size)[:41])


def loaded(target, **changes) -> LoadedModel:
    """A target as `load` gives it, without a tokenizer."""
    config = dataclasses.replace(target.config, **changes)
    return LoadedModel(config, target, None, "tiny", np.dtype("float32"))


def eagle_config(generation=3, few=True, **changes) -> EagleConfig:
    layer = dataclasses.replace(
        TINY, num_layers=1, vocab_size=len(IDS) if few else TINY.vocab_size
    )
    values = {
        "generation": generation,
        "layer": layer,
        "target_vocab": TINY.vocab_size,
        "target_dim": TINY.embed_dim,
        "feature_layers": (TINY.num_layers,) if generation == 1 else (0, 1, 2),
    }
    return EagleConfig(**values | changes)


def medusa_config(few=True, **changes) -> MedusaConfig:
    values = {
        "heads": 3,
        "blocks": 1,
        "target_dim": TINY.embed_dim,
        "target_vocab": TINY.vocab_size,
        "vocab_size": len(IDS) if few else TINY.vocab_size,
        "target_layers": TINY.num_layers,
    }
    return MedusaConfig(**values | changes)


def random_drafter(config, target):
    """Random everywhere but in what is the target's."""
    cls = EagleModel if isinstance(config, EagleConfig) else MedusaHeads
    model = cls(config, rngs=nnx.Rngs(3))
    for i, leaf in enumerate(jax.tree.leaves(model, is_leaf=_is_parameter)):
        if _is_parameter(leaf):
            noise = jax.random.normal(jax.random.key(i), leaf[...].shape)
            leaf[...] = leaf[...] + 0.1 * noise
    if config.reduced:
        model.token_ids[...] = jnp.asarray(IDS, jnp.int32)
    if getattr(config, "shared_embedding", False):
        model.embedding[...] = target.embedding[...]
    if config.shared_head:
        head = target.head[...]
        model.head[...] = head[IDS] if config.reduced else head
    return model


def _is_parameter(leaf) -> bool:
    return isinstance(leaf, nnx.Param)
