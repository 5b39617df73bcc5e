"""Checks of single settings; what is wrong is named in one line."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from treespec_jax.errors import UserError

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Builds a dataclass from a mapping and names any key it does not know.

    Args:
      cls: a dataclass.
      values: its fields; missing ones take their default.
      what: what the mapping is, for the message ("speculative", "sampling", …).

    Raises:
      UserError: an unknown key, or a missing one without default.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"unknown key {key!r} in {what}{hint} (known: {', '.join(fields)})"
            )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise UserError(f"{what} lacks {name!r}")
    return cls(**values)


def check_int(name: str, value: Any, least: int) -> None:
    """Raises UserError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_float(
    name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """Raises UserError unless `value` is finite and in [low, high] (or (low, high])."""
    bracket = "(" if open_low else "["
    span = f"{bracket}{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, got {value!r}") from None
    below = number <= low if open_low else number < low
    if not math.isfinite(number) or below or number > high:
        where = f"in {span}" if high < math.inf else span
        raise UserError(f"{name} must be a finite number {where}, got {value!r}")


def check_optional(name: str, value: Any) -> None:
    """Raises UserError unless `value` is None or a finite number above 0."""
    if value is not None:
        check_float(name, value, 0, open_low=True)


def check_bool(name: str, value: Any) -> None:
    """Raises UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")
