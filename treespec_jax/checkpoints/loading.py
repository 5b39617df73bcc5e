"""Reads any checkpoint that the package knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from treespec_jax.checkpoints import calibration, families, llama2c
from treespec_jax.checkpoints.description import (
    HUGGINGFACE,
    NATIVE,
    Description,
    describe,
)
from treespec_jax.checkpoints.loaded import LoadedModel
from treespec_jax.checkpoints.native import NativeSource
from treespec_jax.checkpoints.pieces import TensorSource
from treespec_jax.checkpoints.placement import Parameters, Progress, check_dtype
from treespec_jax.checkpoints.safetensors_source import SafetensorsSource
from treespec_jax.sharding import Rules


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress = iter,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
) -> LoadedModel:
    """Reads a checkpoint; memory peaks at the parameters and a few MiB.

    Args:
      path: a Hugging Face folder, a llama2.c version 0 `.bin` file, or a folder
        that `save` wrote.
      dtype: float32, bfloat16 or float16; None: as stored.
      tokenizer: a file to use instead of the one found with the weights.
      progress: wraps the list of parameters as they are read, to show a bar.
      mesh: of devices that hold the parameters together, see `sharding.make_mesh`; a
        process reads what its own devices hold. None: the first device holds all.
      rules: how the parameters are cut; None: the default ones.

    Raises:
      UserError: the path is missing, unreadable or of no known kind; a tensor is
        missing, unread, of the wrong shape or not finite; a setting is not supported;
        the tokenizer does not fit the embedding (see `check_rows`); a calibration
        beside it holds no tau; a rule names an
        axis that the mesh does not have.
    """
    wanted = None if dtype is None else check_dtype(dtype)
    about = describe(path, tokenizer)
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
    path, config = about.path, about.config
    source: TensorSource
    if about.kind == NATIVE:
        source, table, ignored = NativeSource(path), None, ()
    elif about.kind == HUGGINGFACE:
        source = SafetensorsSource(path)
        names = families.name_table(config, source.shapes())
        table, ignored = names.pieces, names.ignored
    else:
        source = llama2c.Llama2cSource(path)
        table, ignored = llama2c.name_table(config), llama2c.IGNORED
    dtype = dtype or check_dtype(source.dtype)
    return Parameters(config, dtype, table, source, ignored), dtype
