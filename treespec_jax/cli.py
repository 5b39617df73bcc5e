"""Runs a script's `main`: flags in, one clear line out when the user can fix it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from treespec_jax.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130

# Names of the flags that `define_config` made.
_config_flags: list[str] = []


def run(
    main: Callable[[list[str]], Any], argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits.

    Unlike `absl.app.run` it answers a mistake on the command line, a `UserError` and a
    file that cannot be read or written with one line on stderr and exit code 2, and an
    interrupt with exit code 130. Any other exception is a bug and keeps its traceback.

    Args:
      main: gets the program name alone, as positional arguments are refused; what it
        returns is the exit code, None is 0.
      argv: the command line; None: that of the process.

    Raises:
      SystemExit: always.
    """
    try:
        rest = _parse(list(sys.argv if argv is None else argv))
        code = main(rest)
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing is wrong. The
        # interpreter would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}; check the path")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def define_config(name: str, default: str | None, help_text: str) -> flags.FlagHolder:
    """Defines a flag that names a ml_collections file: --config=x.py --config.key=1.

    ml_collections reads the command line while such a flag is being defined, before
    any `main` can catch what goes wrong, and keeps a failure to load the file for the
    first use of the value. Here both become the usual line and exit code 2.
    """
    from ml_collections import config_flags

    try:
        holder = config_flags.DEFINE_config_file(name, default, help_text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(_about_config(error))

    _config_flags.append(name)
    return holder


def fail(message: str) -> NoReturn:
    """Prints the message as one line on stderr and exits with code 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(USER_ERROR)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags. Raises UserError for anything wrong with them."""
    app.define_help_flags()
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # --help, which absl ends with 1
        sys.exit(0)
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from None
    # What a configuration file named by a flag, or an override of it, runs into.
    except (
        AttributeError,
        ImportError,
        KeyError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(_about_config(error)) from None
    for name in _config_flags:
        _check_loaded(name)
    if len(rest) > 1:
        raise UserError(
            f"argument {rest[1]!r} is not a flag; give --name=value (--help lists them)"
        )
    return rest


def _check_loaded(name: str) -> None:
    from ml_collections import config_flags

    config = flags.FLAGS[name].value
    try:
        if config is not None:
            config.keys()
    except OSError:
        path = config_flags.get_config_filename(flags.FLAGS[name])
        raise UserError(
            f"--{name}={path} is not a file to read settings from"
        ) from None


def _about_config(error: BaseException) -> str:
    """ml_collections raises an AttributeError around a KeyError: key and hint."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, SyntaxError):
        reason = str(error)
    key, _, hint = reason.partition("\n")
    if key.strip("\"'").isidentifier():
        return f"the configuration has no key {key} {hint}"
    return f"configuration: {reason}"
