"""Drafters that read their target's rows (EAGLE, Medusa), as checkpoints.

A kind of checkpoint takes a module here and a line in `FORMATS`. Importing this starts
no jax.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints import names
from treespec_jax.checkpoints.catalogue import CATALOGUE
from treespec_jax.checkpoints.drafters.description import (
    DrafterDescription,
    DrafterFormat,
    Target,
    check_target,
    fetched,
)
from treespec_jax.checkpoints.drafters.eagle import PublishedEagle
from treespec_jax.checkpoints.drafters.medusa import PublishedMedusa
from treespec_jax.checkpoints.drafters.native import NativeDrafter
from treespec_jax.checks import from_mapping
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, EagleOptions

# Loaded on first use: a drafter can be described without starting jax.
_WITH_JAX = {
    "LoadedDrafter": "treespec_jax.checkpoints.drafters.loading",
    "load_drafter": "treespec_jax.checkpoints.drafters.loading",
    "check_output": "treespec_jax.checkpoints.drafters.saving",
    "save": "treespec_jax.checkpoints.drafters.saving",
}

__all__ = [
    "DrafterDescription",
    "choose",
    "describe_draft",
    "describe_drafter",
    "method_of",
    "users_of",
    *_WITH_JAX,
]

FORMATS: tuple[DrafterFormat, ...] = (
    NativeDrafter(),
    PublishedMedusa(),
    PublishedEagle(),
)
METHODS = ("eagle", "medusa")


def users_of(method: str) -> tuple[str, ...]:
    """Methods of `SpeculativeConfig` that take a drafter of that method."""
    return (method, "auto") if method == "eagle" else (method,)


def method_of(path: Path) -> str:
    """The method of the drafter at that path; "": it holds none of these drafters.

    Raises:
      UserError: a file that says so is damaged.
    """
    return next(filter(None, (known.method(path) for known in FORMATS)), "")


def choose(target: Any, config: SpeculativeConfig) -> SpeculativeConfig:
    """The same with the drafter that goes with the target, and its method.

    Args:
      target: what the user gave; a name of the catalogue has its drafter.
      config: what it leaves open is filled in, as far as no network is needed.

    Raises:
      UserError: the method is not that of the drafter.
    """
    if isinstance(target, str):
        config = names.with_drafter(target, config)
    model, method = config.model, getattr(config.model, "method", "")
    if isinstance(model, (str, Path)) and model:
        path = names.here(model)
        method = method_of(path) if path is not None else ""
    if not method or config.method in ("none", *users_of(method)):
        return config
    if config.method:
        raise _contradiction(model, method, config.method)
    return dataclasses.replace(config, method=method)


def describe_draft(
    target: Target, config: SpeculativeConfig, tokenizer: str | Path | None = None
) -> Any:
    """Describes what drafts: a model of its own, or a drafter over the target's rows.

    Args:
      target: a described or loaded model, which it is for.
      config: names it by its path or name, or holds it; has its method and options.
      tokenizer: for a model of its own, as of `checkpoints.describe`.

    Returns:
      a `Description` or a `DrafterDescription`; or what `config` holds, checked.

    Raises:
      UserError: as `describe` and `describe_drafter`; the method is for the other kind.
    """
    from treespec_jax.checkpoints.formats import describe

    model = config.model
    if isinstance(model, (str, Path)):
        located = names.locate(model, "drafter")
        if config.method in METHODS:
            # The first ones are known by their weights alone.
            fetched(located.repository, located.path)
        name, method = located.name, method_of(located.path)
    else:
        name, method = model, getattr(model, "method", "")
    if method and config.method not in ("", *users_of(method)):
        raise _contradiction(name, method, config.method)
    if not method and config.method in METHODS:
        name = getattr(model, "name", None) or getattr(model, "source", name)
        raise UserError(
            f"{name} holds no drafter of method {config.method!r}; give one, or leave "
            "the method out"
        )
    if not isinstance(model, (str, Path)):
        if method:
            where = getattr(model, "path", None) or model.source
            check_target(where, model.config, target.config)
        return model
    if method:
        # The options of "auto" are those of its sources.
        said = {} if config.method == "auto" else dict(config.options)
        return describe_drafter(model, target, said)
    return describe(model, tokenizer)


def describe_drafter(
    path: str | Path, target: Target, options: Mapping[str, Any] | None = None
) -> DrafterDescription:
    """Reads what a drafter says about itself, without its weights; milliseconds.

    Args:
      path: of the file or folder, or its name.
      target: a described or loaded model, which the drafter is for.
      options: what the user says of it, see `EagleOptions`.

    Raises:
      UserError: the path holds no drafter, is unreadable, or is not for that target.
    """
    located = names.locate(path, "drafter")
    reader = next((f for f in FORMATS if f.method(located.path)), None)
    if reader is None:
        raise UserError(f"{located.path} holds no drafter of methods eagle or medusa")
    fetched(located.repository, located.path)
    said = from_mapping(EagleOptions, options or {}, "options of the drafter")
    about = reader.describe(located.path, target, said)
    check_target(located.path, about.config, target.config)
    about = dataclasses.replace(
        about, name=located.name, known=located.name in CATALOGUE
    )
    return _with_length(about, target)


def _with_length(about: DrafterDescription, target: Target) -> DrafterDescription:
    if not isinstance(about.config, EagleConfig):
        return about
    ours, its = target.config.max_positions, about.config.layer.max_positions
    if its >= ours:
        return about
    note = (
        f"{about.name} was trained for {its} positions, the target for {ours}: later "
        "in a text it may be right less often"
    )
    return dataclasses.replace(about, notes=(*about.notes, note))


def _contradiction(model: Any, found: str, method: str) -> UserError:
    name = getattr(model, "name", None) or getattr(model, "source", None) or model
    return UserError(
        f"{name} is a drafter of method {found!r}, not {method!r}; leave the method "
        f"out, or take {found!r}"
    )


def __getattr__(name: str):
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_JAX[name]), name)
