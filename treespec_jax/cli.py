"""Runs a script's `main`: flags in, one clear line out when the user can fix it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from pallas_kernels import machine
from treespec_jax.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130


def run(
    main: Callable[[list[str]], Any], argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits.

    Unlike `absl.app.run` it answers a mistake on the command line, a `UserError` and
    what the system refuses (a file that cannot be read, a full disk) with one line on
    stderr and exit code 2, and an interrupt with exit code 130. Any other exception is
    a bug and keeps its traceback.

    Args:
      main: gets the program name alone, as positional arguments are refused; what it
        returns is the exit code, None is 0.
      argv: the command line; None: that of the process.

    Raises:
      SystemExit: always.
    """
    try:
        skip_absent_tpu()
        rest = _parse(list(sys.argv if argv is None else argv))
        code = main(rest)
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output left, as `head` does; nothing is wrong.
        _drop_output()
        sys.exit(0)
    except OSError as error:
        if error.filename is not None:
            fail(f"{error.filename}: {error.strerror}; check the path")
        if error.errno is None:  # raised by some library, not by the system
            raise
        # Reads and writes of open files do not say which.
        _drop_output()
        fail(f"{error.strerror}; check the disk, and where the output goes")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def skip_absent_tpu() -> None:
    """Keeps jax, before it starts, from looking for a TPU that is not there.

    Where libtpu is installed for its compiler alone, the search takes seconds and ends
    in errors on stderr. What the user chose in JAX_PLATFORMS stands.
    """
    if os.environ.get("JAX_PLATFORMS") or not importlib.util.find_spec("libtpu"):
        return
    if machine.has_tpu():
        return
    plugins = {p.name for p in importlib.metadata.entry_points(group="jax_plugins")}
    cuda = any("cuda" in name for name in plugins)
    if cuda and machine.has_nvidia():
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    elif all("cuda" in name for name in plugins):
        os.environ["JAX_PLATFORMS"] = "cpu"


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines --config=FILE with overrides --config.NAME=VALUE.

    The file is a program and its overrides are read by reflection, so that about any
    exception may come out of parsing; all of them become one line that names the file.
    A value that is there is a ConfigDict.

    Args:
      default: the file in force when none is named; its mistakes end the program here.
    """
    from ml_collections import config_flags

    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "settings, a file of configs/; --config.NAME=VALUE changes one of them, and "
        "the flags below win over both",
    )
    flag = flags.FLAGS["config"]
    flag.parser = _ConfigParser(flag.parser)
    parse = flag.parse

    def parse_with_overrides(argument: str) -> None:
        with _config_errors(argument):
            parse(argument)

    flag.parse = parse_with_overrides
    if default is not None:
        try:
            with _config_errors(default):
                flags.set_default(holder, default)
        except flags.Error as error:
            fail(str(error))
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
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        hint = "--help lists the flags"
        if name.startswith("config."):
            hint = f"--{name} changes a setting of the file named by --config=FILE"
        raise UserError(f"{str(error).rstrip(' ?')}; {hint}") from None
    except flags.Error as error:
        missing = re.match(r"flag --(\w+)=None: .* other than None", str(error))
        if missing:
            raise UserError(f"--{missing[1]} is missing; give it a value") from None
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(
            f"argument {rest[1]!r} is not a flag; give --name=value (--help lists them)"
        )
    return rest


def _drop_output() -> None:
    """Lets what is still buffered go nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ConfigParser(flags.ArgumentParser):
    """Loads a configuration file; what goes wrong is raised at once.

    ml_collections keeps a file that cannot be read for the first look at its value,
    and takes whatever `get_config` returns.
    """

    def __init__(self, inner: flags.ArgumentParser):
        self._inner = inner

    def parse(self, argument: str) -> Any:
        # A file loaded earlier would lend its names to this one.
        sys.modules.pop("config_config", None)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # it warns of None, refused below
        try:
            config = self._inner.parse(argument)
        finally:
            logging.set_verbosity(verbosity)
        if not hasattr(config, "to_dict"):  # an unreadable file raises OSError here
            raise flags.IllegalFlagValueError(
                f"--config={argument}: get_config() must return a ConfigDict, not "
                f"{config!r:.40}"
            )
        return config

    def flag_type(self) -> str:
        return self._inner.flag_type()


@contextlib.contextmanager
def _config_errors(argument: str) -> Iterator[None]:
    """Turns any exception into a flag error of one line that names the file."""
    try:
        yield
    except OSError as error:
        # Of the file itself ml_collections says where it looked, not what is wrong.
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
