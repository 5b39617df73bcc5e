"""What is known of a drafter over its target's rows before its weights are read.

Free of jax.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np

from treespec_jax.checkpoints.hub import HubName
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, EagleOptions, HeadConfig


class Target(Protocol):
    """A described or a loaded target."""

    config: ModelConfig
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class DrafterDescription:
    """A drafter without its weights.

    Attributes:
      method: of `SpeculativeConfig`, "eagle" or "medusa".
      config: its shape.
      path: of the file or folder.
      format: reads the weights.
      dtype: name of the stored parameters' dtype, where it is known without them.
      notes: what to know of the checkpoint, a line each.
      name: what reports call it.
      known: it is of the catalogue, or was checked: it reads the rows that it should
        (`drafting.wiring`).
    """

    method: str
    config: HeadConfig
    path: Path
    format: DrafterFormat
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    name: str = ""
    known: bool = False

    @property
    def kind(self) -> str:
        """What has such tensors."""
        return f"method {self.method}"

    def open(self) -> Tensors:
        """The tensors, unread, and where they go; what is the target's is not there.

        Raises:
          UserError: a file is missing or damaged.
        """
        return self.format.open(self)


class DrafterFormat(Protocol):
    """One kind of drafter's checkpoint: an object without state."""

    def method(self, path: Path) -> str:
        """The method of the drafter at that path; "" if it is of no such kind.

        Raises:
          UserError: a file that says so is damaged.
        """

    def describe(
        self, path: Path, target: Target, options: EagleOptions
    ) -> DrafterDescription:
        """Reads what is known without the weights; milliseconds.

        Args:
          path: that it claims.
          target: which the drafter is for.
          options: what the user says of the checkpoint.

        Raises:
          UserError: a file is damaged, or a setting is not supported.
        """

    def open(self, description: DrafterDescription) -> Tensors:
        """See `DrafterDescription.open`."""

    def token_ids(self, description: DrafterDescription) -> np.ndarray:
        """int64 [Vd], the target's number of each token of a reduced vocabulary.

        Raises:
          UserError: a file is missing or damaged.
        """


def fetched(repository: HubName | None, path: Path) -> None:
    """Downloads the weights of a drafter of the hub, whose names say what it is."""
    if repository is not None and repository.file is None:
        repository.fetch_weights(path)


def with_options(config: HeadConfig, options: EagleOptions) -> HeadConfig:
    """The same with what the user says of it."""
    changes = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if value not in ((), None)
    }
    if not changes or not isinstance(config, EagleConfig):
        return config
    return dataclasses.replace(config, **changes)


def check_target(path: Path, config: HeadConfig, target: ModelConfig) -> None:
    """Checks that a drafter's shape goes with the target.

    Raises:
      UserError: another vocabulary, width or number of layers; names both.
    """
    layers = config.feature_layers
    wanted = {
        "tokens": (config.target_vocab, target.vocab_size),
        "features of width": (config.target_dim, target.embed_dim),
    }
    if not isinstance(config, EagleConfig):
        wanted["layers"] = config.target_layers, target.num_layers
    for what, (theirs, ours) in wanted.items():
        if theirs != ours:
            raise UserError(
                f"{path} drafts for a target of {what} {theirs}, this one has {ours}; "
                "take the drafter that was trained for the target"
            )
    if layers[-1] > target.num_layers:
        raise UserError(
            f"{path}: feature_layers={list(layers)} is past the target's "
            f"{target.num_layers} layers; take the drafter that was trained for it, or "
            "name other layers"
        )
    if isinstance(config, EagleConfig) and config.layer.embed_dim != target.embed_dim:
        for part in ("shared_embedding", "shared_head"):
            if getattr(config, part):
                raise UserError(
                    f"{path}: width {config.layer.embed_dim} is not the target's "
                    f"{target.embed_dim}, so that {part.partition('_')[2]} cannot be "
                    "the target's; the checkpoint must hold its own"
                )


def check_ids(path: Path, ids: np.ndarray, config: HeadConfig) -> None:
    """Checks the numbers of a reduced vocabulary.

    Raises:
      UserError: they do not ascend, or are not of the target.
    """
    good = ids.shape == (config.draft_vocab,) and (np.diff(ids) > 0).all()
    if not good or ids[0] < 0 or ids[-1] >= config.target_vocab:
        raise UserError(
            f"{path}: the tokens that the drafter knows must ascend within the "
            f"target's {config.target_vocab}; the file is damaged, or of another target"
        )
