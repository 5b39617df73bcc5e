"""Reads any drafter over its target's rows that the package knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from treespec_jax.checkpoints import calibration
from treespec_jax.checkpoints.drafters.description import (
    DrafterDescription,
    check_ids,
    check_target,
)
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.checkpoints.placement import Parameters, Progress
from treespec_jax.models.drafter_config import HeadConfig
from treespec_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter with its weights.

    Attributes:
      method: of `SpeculativeConfig`, "eagle" or "medusa".
      config: its shape.
      model: `EagleModel` or `MedusaHeads`. What is the target's is the target's own
        array, but for a reduced vocabulary, whose rows of the head are copied.
      source: name of the file or folder that it came from, or that the user gave.
      dtype: of activations, norms and biases, the target's.
      notes: what to know of the checkpoint, a line each.
      tau: fitted for it, or None (`calibration`).
      known: see `DrafterDescription`.
    """

    method: str
    config: HeadConfig
    model: nnx.Module
    source: str
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    tau: float | None = None
    known: bool = False


def load_drafter(
    about: DrafterDescription, target: LoadedModel, *, progress: Progress = iter
) -> LoadedDrafter:
    """Reads a drafter onto the devices of its target, in the target's types.

    Args:
      about: what `describe_drafter` gave for that target.
      target: with weights.
      progress: as of `checkpoints.load`.

    Raises:
      UserError: a tensor is missing, unread, of the wrong shape or not finite; the
        tokens that it knows are not the target's; a calibration beside it holds no tau.
    """
    check_target(about.path, about.config, target.config)
    mesh = _mesh_of(target.model)
    given = _given(about, target.model, mesh)
    parameters = Parameters(about, target.dtype, given, target.weights)
    return LoadedDrafter(
        about.method,
        about.config,
        parameters.build(progress, mesh),
        about.name,
        np.dtype(target.dtype),
        about.notes,
        calibration.read_tau(about.path),
        about.known,
    )


def _given(about: DrafterDescription, target: Transformer, mesh) -> dict[str, Any]:
    """What is not read as a parameter is: tokens, and what is the target's."""
    given, config, ids = {}, about.config, None
    if config.reduced:
        numbers = about.format.token_ids(about)
        check_ids(about.path, numbers, config)
        ids = jnp.asarray(numbers, jnp.int32)
        if mesh is not None:
            ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec()))
        given["token_ids"] = ids
    if config.shared_embedding:
        given["embedding"] = target.embedding[...]
    if config.shared_head:
        tied = target.config.tied_embeddings
        table_VD = (target.embedding if tied else target.head)[...]
        given["head"] = table_VD if ids is None else table_VD[ids]
    return given


def _mesh_of(target: Transformer) -> jax.sharding.Mesh | None:
    sharding = target.embedding[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None
