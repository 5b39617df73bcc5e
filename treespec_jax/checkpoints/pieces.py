"""What a name table is made of, and where its tensors come from; free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one tensor of a checkpoint goes.

    Attributes:
      name: of the tensor in the checkpoint.
      shape: that it must have there.
      path: of the parameter, dotted: "layers.0.attention.qkv".
      index: of the part of the parameter that it fills; () is all of it. The tensor is
        reshaped to that part.
      interleaved: the rows of each head are rotary pairs (0, 1), (2, 3), …; they become
        (0, H/2), (1, H/2 + 1), …. The part is then [..., H, D].
      unit_offset: the tensor holds 1 + w, the parameter w.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[Any, ...] = ()
    interleaved: bool = False
    unit_offset: bool = False


class TensorSource(Protocol):
    """Reads any part of any tensor, and keeps none.

    Example:

      (rows, columns) = source.shapes()["head"]
      half = source.read("head", (slice(0, rows // 2), slice(0, columns)))

    Attributes:
      path: what to call the checkpoint in messages.
      dtype: the name of the dtype that most of it is in.
    """

    path: Path
    dtype: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors, without reading them."""

    def dtypes(self) -> Mapping[str, str]:
        """The names of their dtypes, whether numpy knows them or not."""

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor; `region` holds a start and a stop for every axis.

        The array is the caller's own. Raises UserError if the tensor is damaged.
        """

    def files(self) -> Sequence[Path]:
        """The files that the values come from."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint, unread, with their name table.

    Attributes:
      source: reads them.
      pieces: where every tensor goes; together they fill every parameter. None: the
        tensors are the parameters.
      ignored: names of tensors that may be there and are of no use.
    """

    source: TensorSource
    pieces: Sequence[Piece] | None = None
    ignored: Collection[str] = ()
