"""Checks of single settings; what is wrong is named in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from treespec_jax.errors import UserError

T = TypeVar("T")
# Magnitudes of normal numbers of float32; smaller ones are flushed to 0.
_LEAST, _GREATEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def shown(value: Any) -> str:
    """A value in one line of 60 characters at most, for messages."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of numbers of thousands of digits, for example
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


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
            near = difflib.get_close_matches(str(key), fields, n=1)
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
        raise UserError(f"{name} must be a whole number >= {least}, got {shown(value)}")


def check_float(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    wide: bool = False,
) -> None:
    """Raises UserError unless `value` is finite and in [low, high] (or (low, high]).

    Numbers that float32 cannot tell from 0 or infinity are refused, for that is what
    they would become, but for `wide` ones, which the host computes with in float64.
    """
    bracket = "(" if open_low else "["
    span = f"{bracket}{low:g}, {high:g}]" if high < math.inf else f">= {low:g}"
    try:
        if isinstance(value, (str, bytes, bytearray, bool)) or getattr(
            value, "ndim", 0
        ):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be a number, got {shown(value)}") from None
    below = number <= low if open_low else number < low
    if not math.isfinite(number) or below or number > high:
        where = f"in {span}" if high < math.inf else span
        raise UserError(f"{name} must be a finite number {where}, got {shown(value)}")
    if number and not wide and not _LEAST <= abs(number) <= _GREATEST:
        meant = "0" if abs(number) < 1 else "infinity"
        raise UserError(
            f"{name}={value!r} cannot be told from {meant} in float32; give a number "
            f"of {_LEAST:.2g} to {_GREATEST:.2g}"
        )


def check_optional(name: str, value: Any) -> None:
    """Raises UserError unless `value` is None or a finite number above 0."""
    if value is not None:
        check_float(name, value, 0, open_low=True)


def check_bool(name: str, value: Any) -> None:
    """Raises UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {shown(value)}")


def check_ints(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Whole numbers of at least `least`; one of them alone, or None, is taken too.

    Raises:
      UserError: names what is no such number.
    """
    if values is None:
        return ()
    return tuple(as_int(name, value, least) for value in _each(values))


def check_texts(name: str, values: Any) -> tuple[str, ...]:
    """Texts that are not empty; one of them alone, or None, is taken too.

    Raises:
      UserError: names what is no such text, or holds what UTF-8 cannot.
    """
    if values is None:
        return ()
    texts = _each(values)
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{name} must hold non-empty texts, got {shown(values)}")
    for text in texts:
        check_text(name, text)
    return texts


def check_words(name: str, values: Any) -> tuple[str | tuple[int, ...], ...]:
    """Texts, or lists of token ids, none of them empty; one text, or None, is taken.

    Raises:
      UserError: names what is neither.
    """
    if values is None:
        return ()
    problem = f"{name} must hold non-empty texts or lists of token ids"
    words = []
    for value in _each(values):
        if isinstance(value, str):
            words += check_texts(name, value)
            continue
        ids = _each(value) if isinstance(value, Iterable) else ()
        if not ids:
            raise UserError(f"{problem}, got {shown(value)}")
        words.append(tuple(as_int(f"{name} token", token, 0) for token in ids))
    return tuple(words)


def check_functions(name: str, values: Any) -> tuple[Callable[..., Any], ...]:
    """What can be called; one of them alone, or None, is taken too.

    Raises:
      UserError: names what cannot be called, or not be told from others by hash.
    """
    if values is None:
        return ()
    functions = (values,) if callable(values) else _each(values)
    for function in functions:
        if not callable(function) or not isinstance(function, Hashable):
            raise UserError(f"{name} must hold functions, got {shown(function)}")
    return functions


def check_text(name: str, text: str) -> None:
    """Raises UserError if `text` holds half a character, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds {text[error.start]!r}, which is no character but a byte or "
            "a half of one; give text in UTF-8"
        ) from None


def as_bool(name: str, value: Any) -> bool:
    """True or False, numpy's too. Raises UserError for anything else."""
    if str(getattr(value, "dtype", "")) == "bool" and not value.ndim:
        return bool(value)
    check_bool(name, value)
    return value


def as_count(name: str, value: Any) -> int | None:
    """How many, None for none: True is 0 of them, False None.

    Raises:
      UserError: anything but a whole number of at least 0, True, False or None.
    """
    if value is None:
        return None
    try:
        return 0 if as_bool(name, value) else None
    except UserError:
        return as_int(name, value, 0)


def as_int(name: str, value: Any, least: int, bits: int = 31) -> int:
    """A whole number of any type, as numpy has its own.

    Raises:
      UserError: it is none, below `least`, or has more than `bits` bits.
    """
    number = value
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    check_int(name, number, least)
    if number >= 1 << bits:
        raise UserError(f"{name} must be below 2**{bits}, got {shown(number)}")
    return number


def _each(values: Any) -> tuple[Any, ...]:
    """The items of what holds several, or the one value."""
    if not isinstance(values, (str, bytes, Mapping)):
        with contextlib.suppress(TypeError):
            return tuple(values)
    return (values,)


def as_bias(given: Any, count: int) -> tuple[tuple[int, float], ...]:
    """A logit bias as sorted pairs of token id and number.

    Args:
      given: a mapping, pairs, or None for none.
      count: tokens that it may have at most.

    Raises:
      UserError: something else, a token twice, or a number outside [-100, 100].
    """
    bias = () if given is None else given
    try:
        items = bias.items() if isinstance(bias, Mapping) else bias
        pairs = sorted((token, value) for token, value in items)
    except (TypeError, ValueError):
        raise UserError(
            f"logit_bias must map token ids to numbers, got {bias!r}"
        ) from None
    pairs = [(as_int("logit_bias token", t, 0), value) for t, value in pairs]
    if len(pairs) > count:
        raise UserError(f"logit_bias has {len(pairs)} tokens; give {count} at most")
    for token, value in pairs:
        check_float(f"logit_bias of token {token}", value, -100, 100)
    if len({token for token, _ in pairs}) < len(pairs):
        raise UserError(f"logit_bias names a token twice: {bias!r}")
    return tuple((token, float(value)) for token, value in pairs)
