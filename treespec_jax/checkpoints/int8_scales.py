"""Factors per channel that make a model lose less in int8, kept beside its weights.

A row of activations is rounded by its largest number, and a few channels hold numbers
many times as large as the rest. What such a channel is divided by before a product,
the matrix is multiplied by, so that the model in floating point would stay the same
but for rounding (Xiao et al., SmoothQuant, 2211.10438):

| divided | multiplied, by column |
|---|---|
| `attention_norm.scale` | `attention.qkv` |
| `mlp_norm.scale` | `mlp.gate_up` |
| the up rows of `mlp.gate_up` | `mlp.down` |

Nothing is left to do for it when the model runs. Light: no jax.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.catalogue import CATALOGUE
from treespec_jax.checkpoints.files import read_bytes, write_whole
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

NAME = "int8_scales.npz"
_KIND, _VERSION = "treespec int8 scales", 1
_NAMES = ("attention", "mlp", "down")
_PATH = re.compile(
    r"layers\.(\d+)\.(attention_norm\.scale|attention\.qkv|mlp_norm\.scale"
    r"|mlp\.gate_up|mlp\.down)"
)
# Steps of a factor's exponent per power of two, and its largest, either way.
STEPS, LARGEST = 8, 64
_REMEDY = "make it again with calibrate_int8, or delete it"


@dataclasses.dataclass(frozen=True)
class Int8Scales:
    """Factors 2^(e / 8), as their e in int8.

    Attributes:
      attention: [layers, D], of the channels that `qkv` reads.
      mlp: [layers, D], of those that `gate_up` reads.
      down: [layers, F], of those that `down` reads.
    """

    attention: np.ndarray
    mlp: np.ndarray
    down: np.ndarray

    @property
    def digest(self) -> int:
        """Tells them from others."""
        return zlib.crc32(b"".join(getattr(self, name).tobytes() for name in _NAMES))

    def apply(
        self, path: str, part: np.ndarray, box: Sequence[tuple[int, int]], offset: float
    ) -> None:
        """Multiplies or divides a part of a parameter in place.

        Args:
          path: of the parameter, dotted.
          part: floating point.
          box: start and stop of the part along every axis of the parameter.
          offset: what norms add to their scale.
        """
        found = _PATH.fullmatch(path)
        if found is None:
            return
        layer, module, name = int(found[1]), *found[2].split(".")
        if module.endswith("norm"):
            factors = _powers(getattr(self, module[: -len("_norm")]), layer, box[0])
            part[...] = (part.astype(np.float32) + offset) / factors - offset
            return
        columns = self.down if name == "down" else getattr(self, module)
        part *= _powers(columns, layer, box[-1])
        (first, stop), rows = box[:2]
        if name == "gate_up" and first <= 1 < stop:
            part[1 - first] /= _powers(self.down, layer, rows)[:, None]


def _powers(exponents: np.ndarray, layer: int, span: tuple[int, int]) -> np.ndarray:
    """float32 factors of some channels of a layer."""
    return np.exp2(exponents[layer, slice(*span)].astype(np.float32) / STEPS)


def file_of(checkpoint: Path) -> Path:
    """Where the factors of a checkpoint are kept: in its folder, or beside its file."""
    if checkpoint.is_dir():
        return checkpoint / NAME
    return checkpoint.with_name(f"{checkpoint.name}.{NAME}")


def read(checkpoint: Path, config: ModelConfig) -> Int8Scales | None:
    """The factors beside a checkpoint, or those that this package has; None: none.

    Raises:
      UserError: the file is damaged or of another model.
    """
    file = file_of(checkpoint)
    if not file.is_file():
        known = (m.int8_scales for m in CATALOGUE.values() if m.path == checkpoint)
        file = next(filter(None, known), None)
    if file is None:
        return None
    data = read_bytes(file)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            found = Int8Scales(*(arrays[name] for name in _NAMES))
        sound = (about["kind"], about["version"]) == (_KIND, _VERSION)
        sound = sound and all(
            getattr(found, name).dtype == np.int8
            and np.abs(getattr(found, name).astype(int)).max(initial=0) <= LARGEST
            for name in _NAMES
        )
    except Exception:  # on damaged bytes zipfile and NumPy raise about anything
        sound = False
    if not sound:
        raise UserError(f"{file} does not hold factors for int8; {_REMEDY}")
    sizes = {"attention": config.embed_dim, "mlp": config.embed_dim}
    for name, size in (sizes | {"down": config.mlp_dim}).items():
        shape, wanted = getattr(found, name).shape, (config.num_layers, size)
        if shape != wanted:
            raise UserError(
                f"{file} is of another model: {name} has shape {list(shape)}, not "
                f"{list(wanted)}; {_REMEDY}"
            )
    return found


def write(file: Path, scales: Int8Scales, details: Mapping[str, Any]) -> None:
    """Writes all of the factors, or nothing.

    Args:
      file: see `file_of`.
      scales: the factors.
      details: how they came about, plain values.

    Raises:
      UserError: it cannot be written.
    """
    about = json.dumps({"kind": _KIND, "version": _VERSION, **details})
    arrays = {name: getattr(scales, name) for name in _NAMES}
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(about), **arrays)
    write_whole(file, data.getvalue(), "give --output=FILE")
