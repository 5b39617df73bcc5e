"""What steps cost on this machine, kept in the user's cache folder.

A file for each kind of device, models' shapes, types, number of slots and release of
jax: figures of one mean nothing for another. A file that cannot be read or written is
like none: costs are then learnt anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from treespec_jax.checkpoints.files import cache_folder, read_json, write_whole
from treespec_jax.config import EngineConfig, ModelConfig
from treespec_jax.drafting.protocol import Drafter
from treespec_jax.engine.costs import Costs, Known, usual_curve
from treespec_jax.errors import UserError
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer

# What a file raises that is not there, cut off, or of another form.
_UNREADABLE = UserError, OSError, AttributeError, KeyError, TypeError, ValueError


@dataclasses.dataclass(frozen=True)
class CostFile:
    """The file of one engine's costs.

    Attributes:
      about: what the figures hold for, plain values.
      cpu: whether the device is one.
      with_model: whether the drafter runs passes of a model.
      slots: B.
    """

    about: dict[str, Any]
    cpu: bool
    with_model: bool
    slots: int

    @classmethod
    def of(
        cls, target: Transformer, drafter: Drafter, config: EngineConfig
    ) -> CostFile:
        """Of an engine with these parts."""
        leaves = FlatModule(target).leaves
        sizes = {name: getattr(target.config, name) for name in ModelConfig.SIZES}
        device = min(leaves[0].devices(), key=lambda device: device.id)
        cpu, module = device.platform == "cpu", drafter.module
        draft = sum(leaf.size for leaf in FlatModule(module).leaves)
        about = {
            "device": device.device_kind,
            "devices": len(leaves[0].devices()),
            "host": f"{platform.machine()}, {os.cpu_count()} CPUs" if cpu else "",
            "target": sizes,
            "dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
            "cache_dtype": config.cache_dtype,
            **({"exact": config.exact} if config.exact else {}),
            "drafter": f"{type(drafter).__name__}, {draft} parameters",
            "slots": config.max_batch,
            "jax": jax.__version__,
        }
        return cls(about, cpu, module is not None, config.max_batch)

    @property
    def path(self) -> Path:
        """In the user's cache folder; it need not be there."""
        key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode())
        return cache_folder() / "costs" / f"{key.hexdigest()[:20]}.json"

    def read(self) -> Known:
        """What the file holds; nothing if it cannot be read."""
        with contextlib.suppress(*_UNREADABLE):
            values = read_json(self.path)
            if values["about"] == self.about:
                return Known.from_dict(values)
        return Known()

    def write(self, known: Known) -> None:
        """Replaces the file, where that is possible."""
        data = json.dumps({"about": self.about} | known.as_dict(), indent=1) + "\n"
        with contextlib.suppress(UserError, OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, data.encode(), "check the disk")

    def costs(self) -> Costs:
        """Costs that begin with what the file holds, and are kept in it."""
        usual = usual_curve(self.cpu, self.with_model)
        return Costs(usual, self.slots, self.read(), self.write)
