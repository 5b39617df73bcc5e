"""Reads any checkpoint that the package knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treespec_jax.checkpoints import calibration
from treespec_jax.checkpoints.formats import Description, describe
from treespec_jax.checkpoints.placement import Parameters, Progress
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer
from treespec_jax.sharding import Rules


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
      config: shape and constants; `bos_id` is the tokenizer's if there is one, and
        `eos_ids` holds its ends of text too.
      model: the decoder.
      tokenizer: or None if the checkpoint has none.
      source: name of the file or folder that it came from, or that the user gave.
      dtype: of activations, norms and biases.
      notes: what of the checkpoint was left out, a line each.
      tau: fitted for it as a drafter, or None (`calibration`).
    """

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer | None
    source: str
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    tau: float | None = None

    @property
    def weights(self) -> str:
        """Type of the matrices, see `models.weight_types`."""
        return self.model.types.weights


def check_floats(loaded: LoadedModel) -> None:
    """Checks that a model's numbers can be computed with, not only its products.

    Raises:
      UserError: its matrices are in int8.
    """
    if loaded.model.types.is_int8:
        raise UserError(
            f"{loaded.source}: weights are {loaded.weights}, which can be run but not "
            "trained or changed; take the checkpoint that they were made of"
        )


def load(
    checkpoint: str | Path | Description,
    dtype: Any = None,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress = iter,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    weights: str | None = None,
) -> LoadedModel:
    """Reads a checkpoint; memory peaks at the parameters and a few MiB.

    Args:
      checkpoint: the path of a Hugging Face folder, a GGUF file, a llama2.c version 0
        `.bin` file, or a folder that `save` wrote; a name of the catalogue, or
        `org/name` of the Hugging Face Hub (see `names.locate`); or what `describe` gave
        for one, which is not described again.
      dtype: float32, bfloat16 or float16, of activations, norms and biases; None: as
        stored.
      tokenizer: to use instead of the one found with the weights or described; see
        `describe`.
      progress: wraps the list of parameters as they are read, to show a bar.
      mesh: of devices that hold the parameters together, see `sharding.make_mesh`; a
        process reads what its own devices hold. None: the first device holds all.
      rules: how the parameters are cut; None: the default ones.
      weights: type of the matrices, see `models.weight_types`, such as "int8"; None:
        that of `dtype`, but int8 where so stored.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a name that cannot
        be had; a tensor is missing, unread, of the wrong shape or not finite; a setting
        is not supported; the tokenizer does not fit the embedding (see `check_rows`); a
        calibration beside it holds no tau; a rule names an axis that the mesh does not
        have.
    """
    if not isinstance(checkpoint, Description):
        checkpoint = describe(checkpoint, tokenizer)
    elif tokenizer is not None:
        given = {"name": checkpoint.name, "repository": checkpoint.repository}
        checkpoint = dataclasses.replace(describe(checkpoint.path, tokenizer), **given)
    parameters = Parameters(checkpoint, dtype, weights=weights)
    return LoadedModel(
        checkpoint.config,
        parameters.build(progress, mesh, rules),
        checkpoint.tokenizer,
        checkpoint.name,
        parameters.types.dtype,
        checkpoint.notes,
        calibration.read_tau(checkpoint.path),
    )
