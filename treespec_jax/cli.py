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
    except (AttributeError, ImportError, KeyError, SyntaxError) as error:
        raise UserError(f"configuration: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"configuration: {error}") from None
    if len(rest) > 1:
        raise UserError(
            f"argument {rest[1]!r} is not a flag; give --name=value (--help lists them)"
        )
    return rest
