"""The flag --config=FILE: a Python file of settings."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags, logging

from treespec_jax.errors import UserError

flags.disclaim_key_flags()


def define(default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE with overrides --config.NAME=VALUE.

    The file is a program and its overrides are read by reflection, so that about any
    exception may come out of parsing; all of them become one line that names the file.
    A value that is there is a ConfigDict.

    Args:
      default: the file in force when none is named.

    Raises:
      UserError: the default file is not one.
    """
    from ml_collections import config_flags

    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "settings, a file of configs/; --config.NAME=VALUE changes one of them, and "
        "other flags win over both",
    )
    flag = flags.FLAGS["config"]
    parse, load = flag.parse, flag.parser.parse

    def parse_with_overrides(argument: str) -> None:
        with _config_errors(argument):
            parse(argument)

    flag.parse = parse_with_overrides
    flag.parser.parse = lambda argument: _checked(load, argument)
    if default is not None:
        try:
            with _config_errors(default):
                flags.set_default(holder, default)
        except flags.Error as error:
            raise UserError(str(error)) from None
    return holder


def _checked(load: Callable[[str], Any], argument: str) -> Any:
    """Loads a configuration file; what goes wrong is raised at once.

    ml_collections keeps a file that cannot be read for the first look at its value,
    and takes whatever `get_config` returns.
    """
    # A file loaded earlier would lend its names to this one.
    sys.modules.pop("config_config", None)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of None, refused below
    try:
        config = load(argument)
    finally:
        logging.set_verbosity(verbosity)
    if not hasattr(config, "to_dict"):  # an unreadable file raises OSError here
        what = f"get_config() must return a ConfigDict, not {config!r:.40}"
        raise flags.IllegalFlagValueError(f"--config={argument}: {what}")
    return config


@contextlib.contextmanager
def _config_errors(argument: str) -> Iterator[None]:
    """Turns any exception into a flag error of one line that names the file."""
    try:
        yield
    except OSError as error:
        # ml_collections reports the paths it tried, not why the file failed.
        cause = error.__cause__
        reason = "the file cannot be read; check the path"
        if isinstance(cause, OSError) and cause.filename:
            reason = f"{cause.filename}: {cause.strerror}; check the path"
    except Exception as error:
        reason = _reason(error)
    else:
        return
    if not reason.startswith("--config"):
        reason = f"--config={argument}: {reason}"
    raise flags.IllegalFlagValueError(reason)


def _reason(error: Exception) -> str:
    """The telling part of what is often a page of text."""
    # ml_collections hands on reprs of reprs.
    text = str(error).replace("\\n", "\n").replace("\\'", "'")
    if text[:1] in ("'", '"') and text[-1] == text[0]:
        text = text[1:-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Traceback" in text:
        return lines[-1]
    if isinstance(error, (AttributeError, KeyError)):
        # An unknown key; all the known ones follow.
        text = " ".join(lines).split(" Other fields present")[0].replace("'", "")
        return text if " " in lines[0] else f"unknown key {text}"
    return lines[0]
