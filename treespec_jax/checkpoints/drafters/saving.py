"""Writes drafters in the package's own format; `drafters.native` says what it holds."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from treespec_jax.checkpoints import saving
from treespec_jax.checkpoints.drafters.description import Target, check_target
from treespec_jax.checkpoints.drafters.native import CONFIGS, FORMAT, TOKEN_IDS, VERSION
from treespec_jax.checkpoints.formats import describe
from treespec_jax.checkpoints.placement import Item, check_dtype, parameters_of
from treespec_jax.checkpoints.tokenizers import fingerprint


def save(
    model: nnx.Module,
    path: str | Path,
    *,
    target: str | Path | Target,
    dtype: Any = "bfloat16",
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes a drafter that `load_drafter` reads back.

    What is the target's is not written. An earlier folder of this kind at `path` is
    replaced, once the new one is whole.

    Args:
      model: `EagleModel` or `MedusaHeads`.
      path: the folder to make; its parents are made too.
      target: which it drafts for, or the path or name of its checkpoint.
      dtype: float32, bfloat16 or float16, of the parameters.
      origin: what the metadata says of where the drafter comes from, by key.

    Raises:
      UserError: `path` holds something else, or cannot be written; a parameter holds
        NaN or infinity; the drafter does not go with the target.
    """
    path = Path(path).expanduser().absolute()
    check_output(path)
    wanted = check_dtype(dtype)
    if isinstance(target, (str, Path)):
        target = describe(target)
    config = model.config
    check_target(path, config, target.config)
    shared = {"head"} if config.shared_head else set()
    if config.shared_embedding:
        shared.add("embedding")
    leaves = parameters_of(model)
    items = [
        Item(name, leaf.size * wanted.itemsize)
        for name, leaf in leaves.items()
        if name not in shared
    ]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    files: dict[str, Any] = {}
    try:
        with saving.writing(path):
            for number, group in enumerate(saving.grouped(items)):
                arrays = {
                    item.path: saving.cast(
                        leaves[item.path], item.path, wanted, path.name
                    )
                    for item in group.items
                }
                if config.reduced and number == 0:
                    arrays[TOKEN_IDS] = np.asarray(model.token_ids[...], np.int32)
                files |= saving.write_group(partial, group.name, arrays)
            about = _about(model, target, wanted, files) | dict(origin or {})
            saving.put_in_place(partial, path, about)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(path: str | Path) -> None:
    """As `checkpoints.check_output`, for a drafter."""
    saving.check_output(path, FORMAT)


def _about(model: nnx.Module, target: Target, dtype: np.dtype, files) -> dict[str, Any]:
    method = next(name for name, cls in CONFIGS.items() if type(model.config) is cls)
    sizes = target.config
    tokenizer = target.tokenizer
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": method,
        "dtype": dtype.name,
        "config": dataclasses.asdict(model.config),
        "target": {
            "name": getattr(target, "name", None) or getattr(target, "source", ""),
            "vocab_size": sizes.vocab_size,
            "embed_dim": sizes.embed_dim,
            "num_layers": sizes.num_layers,
            "vocabulary": fingerprint(tokenizer) if tokenizer is not None else "",
        },
        "files": files,
    }
