"""Reads any checkpoint that the package knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from treespec_jax.checkpoints import calibration
from treespec_jax.checkpoints.description import describe
from treespec_jax.checkpoints.formats import Description
from treespec_jax.checkpoints.loaded import LoadedModel
from treespec_jax.checkpoints.placement import Parameters, Progress, check_dtype
from treespec_jax.sharding import Rules


def load(
    checkpoint: str | Path | Description,
    dtype: Any = None,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress = iter,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
) -> LoadedModel:
    """Reads a checkpoint; memory peaks at the parameters and a few MiB.

    Args:
      checkpoint: the path of a Hugging Face folder, a llama2.c version 0 `.bin` file,
        or a folder that `save` wrote; or what `describe` gave for one, which is not
        described again.
      dtype: float32, bfloat16 or float16; None: as stored.
      tokenizer: a file to use instead of the one found with the weights or described.
      progress: wraps the list of parameters as they are read, to show a bar.
      mesh: of devices that hold the parameters together, see `sharding.make_mesh`; a
        process reads what its own devices hold. None: the first device holds all.
      rules: how the parameters are cut; None: the default ones.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a tensor is
        missing, unread, of the wrong shape or not finite; a setting is not supported;
        the tokenizer does not fit the embedding (see `check_rows`); a calibration
        beside it holds no tau; a rule names an axis that the mesh does not have.
    """
    wanted = None if dtype is None else check_dtype(dtype)
    if not isinstance(checkpoint, Description):
        about = describe(checkpoint, tokenizer)
    elif tokenizer is not None:
        about = describe(checkpoint.path, tokenizer)
    else:
        about = checkpoint
    parameters, wanted = open_parameters(about, wanted)
    model = parameters.build(progress, mesh, rules)
    return LoadedModel(
        about.config,
        model,
        about.tokenizer,
        about.path.name,
        wanted,
        about.notes,
        calibration.read_tau(about.path),
    )


def open_parameters(
    about: Description, dtype: np.dtype | None
) -> tuple[Parameters, np.dtype]:
    """The parameters of a described checkpoint, unread, and their dtype.

    Args:
      about: as `describe` gave it.
      dtype: to cast to; None: as stored.

    Raises:
      UserError: the tensors are not those of the configuration.
    """
    tensors = about.format.open(about)
    dtype = dtype or check_dtype(tensors.source.dtype)
    parameters = Parameters(
        about.config, dtype, tensors.pieces, tensors.source, tensors.ignored
    )
    return parameters, dtype
