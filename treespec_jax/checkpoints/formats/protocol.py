"""What a kind of checkpoint must offer to be read; free of jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

from treespec_jax.checkpoints.hub import HubName
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Description:
    """A checkpoint without its weights.

    Attributes:
      config: shape and constants; `bos_id` is the tokenizer's if there is one, and
        `eos_ids` holds its ends of text too.
      tokenizer: or None if the checkpoint has none.
      path: of the file or folder.
      format: reads the weights.
      dtype: name of the stored parameters' dtype, where it is known without them.
      notes: what of the checkpoint is left out, a line each.
      name: what reports call it.
      repository: of the hub, from which `open` downloads the weights; None: there is
        nothing to download.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    path: Path
    format: Format
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    name: str = ""
    repository: HubName | None = None

    @property
    def kind(self) -> str:
        """What has such tensors."""
        return f"family {self.config.family}"

    def open(self) -> Tensors:
        """The tensors, unread, and where they go.

        Raises:
          UserError: a file is missing or damaged, or cannot be downloaded.
        """
        if self.repository is not None:
            self.repository.fetch_weights(self.path)
        return self.format.open(self)


@runtime_checkable
class Format(Protocol):
    """One kind of checkpoint: an object without state.

    The module of a format imports no jax, so that `describe` does not start it.

    Example, a file that holds configuration, tokenizer and weights:

      class OneFileFormat:
          expects, tokenizer_chosen = "a .one file", False

          def claims(self, path):
              return path.is_file() and path.suffix == ".one"

          def describe(self, path):
              return Description(make_config(read_metadata(path)), None, path, self)

          def read_tokenizer(self, path):
              return make_tokenizer(read_metadata(path), source=str(path))

          def open(self, description):
              table = name_table(description.config)
              return Tensors(OneFileSource(description.path), table)

    Attributes:
      expects: what paths it claims, to complete "give …".
      tokenizer_chosen: whether the tokenizer was checked when the checkpoint was
        written, so that one with far fewer pieces than rows is meant (`check_rows`).
    """

    expects: str
    tokenizer_chosen: bool

    def claims(self, path: Path) -> bool:
        """Whether the path is, or claims to be, a checkpoint of this kind."""

    def describe(self, path: Path) -> Description:
        """Reads what is known without weights and tokenizer, in milliseconds.

        Raises:
          UserError: a file is damaged, or a setting is not supported.
        """

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """The tokenizer that comes with the weights, or None.

        Raises:
          UserError: a file is damaged.
        """

    def open(self, description: Description) -> Tensors:
        """The tensors of a described checkpoint, unread, and where they go.

        Raises:
          UserError: a file is missing or damaged.
        """
