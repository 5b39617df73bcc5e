"""What a kind of checkpoint must offer to be read; free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Header:
    """What a format reads of a checkpoint to describe it.

    Attributes:
      config: shape and constants, without what the tokenizer adds.
      tokenizer: makes the tokenizer that comes with the weights, from a file or from
        metadata; None: there is none.
      dtype: name of the stored parameters' dtype, where it is known without them.
      notes: what of the checkpoint is left out, a line each.
    """

    config: ModelConfig
    tokenizer: Callable[[], Tokenizer] | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()


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
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    path: Path
    format: Format
    dtype: str | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Format(Protocol):
    """One kind of checkpoint: an object without state.

    The module of a format imports no jax, so that `describe` does not start it.

    Example, a file that holds configuration, tokenizer and weights:

      class OneFileFormat:
          expects = "a .one file"

          def claims(self, path):
              return path.is_file() and path.suffix == ".one"

          def describe(self, path):
              metadata = read_metadata(path)
              return Header(
                  make_config(metadata),
                  tokenizer=lambda: make_tokenizer(metadata, source=str(path)),
              )

          def open(self, description):
              table = name_table(description.config)
              return Tensors(OneFileSource(description.path), table)

    Attributes:
      expects: what paths it claims, to complete "give …".
    """

    expects: str

    def claims(self, path: Path) -> bool:
        """Whether the path is, or claims to be, a checkpoint of this kind."""

    def describe(self, path: Path) -> Header:
        """Reads what is known without the weights, in milliseconds.

        Raises:
          UserError: a file is damaged, or a setting is not supported.
        """

    def open(self, description: Description) -> Tensors:
        """The tensors of a described checkpoint, unread, and where they go.

        Raises:
          UserError: a file is missing or damaged.
        """
