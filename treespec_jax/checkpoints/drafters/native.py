"""The package's own folders of drafters: `metadata.json` and `params/` (orbax).

They are written as those of models are (`formats.native`) by `drafters.saving`.
`params/` holds what was trained, and as int32 the tokens of a reduced vocabulary; an
embedding or a head that is the target's is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.drafters.description import (
    DrafterDescription,
    Target,
    with_options,
)
from treespec_jax.checkpoints.files import read_json
from treespec_jax.checkpoints.formats.native import METADATA, NativeSource
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.tokenizers import fingerprint
from treespec_jax.checks import from_mapping
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, EagleOptions, MedusaConfig

FORMAT = "treespec-jax drafter"
VERSION = 1
TOKEN_IDS = "token_ids"
CONFIGS = {"eagle": EagleConfig, "medusa": MedusaConfig}


class NativeDrafter:
    """See `DrafterFormat`."""

    def method(self, path: Path) -> str:
        file = path / METADATA
        if not file.is_file():
            return ""
        values = read_json(file)
        if values.get("format") != FORMAT:
            return ""
        _check(file, values)
        return values["method"]

    def describe(
        self, path: Path, target: Target, options: EagleOptions
    ) -> DrafterDescription:
        values = read_json(path / METADATA)
        method, where = values["method"], f"{path / METADATA}: config"
        config = from_mapping(CONFIGS[method], values["config"], where)
        _check_target(path, values["target"], target)
        return DrafterDescription(
            method, with_options(config, options), path, self, values.get("dtype")
        )

    def open(self, description: DrafterDescription) -> Tensors:
        return Tensors(NativeSource(description.path), ignored=(TOKEN_IDS,))

    def token_ids(self, description: DrafterDescription) -> np.ndarray:
        source = NativeSource(description.path)
        shape = source.shapes().get(TOKEN_IDS)
        if shape is None:
            raise UserError(f"{description.path} lacks {TOKEN_IDS}; save it again")
        return source.read(TOKEN_IDS, tuple(slice(0, size) for size in shape))


def _check(where: Path, values: Mapping[str, Any]) -> None:
    if values.get("version") != VERSION:
        raise UserError(
            f"{where}: version {values.get('version')!r} is not known here, only "
            f"{VERSION}; update treespec-jax, or save the drafter again"
        )
    if values.get("method") not in CONFIGS:
        raise UserError(
            f"{where}: method {values.get('method')!r} is unknown; update treespec-jax"
        )
    for name in ("config", "target"):
        if not isinstance(values.get(name), dict):
            raise UserError(f"{where} lacks {name!r}; save the drafter again")


def _check_target(path: Path, about: Mapping[str, Any], target: Target) -> None:
    """Raises UserError if the drafter was saved for another kind of target."""
    name = about.get("name", "another model")
    for key in ("vocab_size", "embed_dim", "num_layers"):
        theirs, ours = about.get(key), getattr(target.config, key)
        if theirs != ours:
            raise UserError(
                f"{path} drafts for {name}, of {key}={theirs}; this target has "
                f"{key}={ours}: take the drafter that was trained for it"
            )
    known = about.get("vocabulary")
    if known and target.tokenizer and known != fingerprint(target.tokenizer):
        raise UserError(
            f"{path} drafts for {name}, whose tokens are others than this target's; "
            "take the drafter that was trained for it"
        )
