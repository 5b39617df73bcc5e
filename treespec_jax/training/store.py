"""Training checkpoints that survive a kill at any moment.

Each is written under a temporary name and renamed when complete, so that a folder
with the final name is whole. Older ones go only after a newer one is there.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from treespec_jax.errors import UserError

_PARTIAL = ".partial"


class Store:
    """Checkpoints of one kind in one folder; only the newest is kept.

    Args:
      folder: made if it is not there.

    Attributes:
      folder: its absolute path.

    Raises:
      UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for rest in self.folder.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(rest)
            probe = self.folder / f"probe{_PARTIAL}"
            probe.mkdir()
            probe.rmdir()
        except OSError as e:
            raise UserError(f"cannot write to {folder}: {e.strerror}") from None

    def _newest(self) -> pathlib.Path | None:
        found = [p for p in self.folder.glob("step_*") if _PARTIAL not in p.name]
        return max(found, default=None)

    def save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
        """Writes the leaves of `tree` and `notes` (JSON) as the state after `step`."""
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        # A run that was resumed may reach a step that is stored already.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "state", _named(tree))
        with open(partial / "notes.json", "w", encoding="utf-8") as f:
            json.dump(notes, f)
            f.flush()
            os.fsync(f.fileno())
        if final.exists():
            # Equal by determinism; the complete one stays.
            shutil.rmtree(partial)
            return
        partial.rename(final)
        for old in self.folder.glob("step_*"):
            if old != final:
                shutil.rmtree(old)

    def notes(self) -> dict[str, Any] | None:
        """The notes of the newest checkpoint, or None."""
        newest = self._newest()
        if newest is None:
            return None
        return json.loads((newest / "notes.json").read_text(encoding="utf-8"))

    def restore(self, like: Any) -> Any:
        """The newest checkpoint's tree, in the structure of `like`.

        Raises:
          UserError: it does not have the leaves of `like`.
        """
        newest = self._newest()
        wanted = _named(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        )
        with ocp.StandardCheckpointer() as checkpointer:
            try:
                found = checkpointer.restore(newest / "state", wanted)
            except (ValueError, KeyError, OSError) as e:
                reason = str(e).strip().split("\n")[0]
                raise UserError(f"cannot resume from {newest}: {reason}") from None
        leaves = [found[name] for name in sorted(found)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by number: optax's own containers need not be known to read them."""
    leaves = jax.tree.leaves(tree)
    as_array = [np.asarray(x) if np.isscalar(x) else x for x in leaves]
    return {f"{i:05d}": leaf for i, leaf in enumerate(as_array)}
