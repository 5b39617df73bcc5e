"""Runs commands: flags in, one clear line out when the user can fix it."""

from __future__ import annotations

from treespec_jax import commands  # First: it notes when the program started.

# isort: split
# What takes long to import is imported where an interrupt is heeded.
import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from pallas_kernels import machine
from treespec_jax import interrupts
from treespec_jax.errors import UserError

_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console command `treespec`: runs `argv`, else the process's command line."""
    program, *rest = sys.argv if argv is None else argv
    if not rest or rest[0] in _HELP:
        _list_commands()
        sys.exit(0)
    with ending(argv is None):
        _main(program, *rest)


def _main(program: str, name: str, *rest: str) -> NoReturn:
    if name not in commands.COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, commands.COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see treespec --help"
        fail(f"unknown command {name!r}; {hint}")
    run_command(name, [f"{program} {name}", *rest])


def run_command(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one of `commands.COMMANDS` as `run` does."""
    with ending(argv is None):
        _run_command(name, list(sys.argv if argv is None else argv))


def _run_command(name: str, argv: list[str]) -> NoReturn:
    _prepare_streams()
    with _one_line_errors(), interrupts.ends_at_once():
        import inspect

        from absl import flags

        # Some modules import jax, which looks at its variables then.
        skip_absent_tpu()
        module = importlib.import_module(f"{commands.__name__}.{name}")
        module.define()
        if any(argument in _HELP for argument in argv[1:]):
            _, _, listed = flags.FLAGS.module_help(module.__name__).partition(":\n")
            print(inspect.cleandoc(module.__doc__))
            print(f"\nflags:\n{listed}" if listed else "")
            sys.exit(0)
    allowed = len(getattr(module, "ARGUMENTS", ()))
    run(lambda rest: module.main(flags.FLAGS, *rest[1:]), argv, allowed)


def _list_commands() -> None:
    import ast

    width = max(map(len, commands.COMMANDS))
    print("usage: treespec COMMAND [--flag=value …]; COMMAND --help lists flags")
    for name in commands.COMMANDS:
        # The module is not imported: that takes time.
        source = Path(commands.__file__).with_name(f"{name}.py").read_text("utf-8")
        description = ast.get_docstring(ast.parse(source)).partition("\n")[0]
        print(f"  {name:{width}}  {description}")


def run(
    main: Callable[[list[str]], Any],
    argv: Sequence[str] | None = None,
    arguments: int = 0,
) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits.

    Unlike `absl.app.run` it answers a mistake on the command line, a `UserError` and
    what the system refuses (a file that cannot be read, a full disk) with one line on
    stderr and exit code 2, and an interrupt with exit code 130. Any other exception is
    a bug and keeps its traceback.

    Args:
      main: gets the program name and the arguments that are no flags; what it returns
        is the exit code, None is 0.
      argv: the command line; None: that of the process.
      arguments: how many besides flags are taken, at most.

    Raises:
      SystemExit: always.
    """
    _prepare_streams()
    with _one_line_errors():
        with interrupts.ends_at_once():
            rest = _parse(list(sys.argv if argv is None else argv), arguments)
        code = main(rest)
        sys.stdout.flush()
        sys.exit(code)


def skip_absent_tpu() -> None:
    """Keeps jax, before it starts, from looking for a TPU that is not there.

    Where libtpu is installed for its compiler alone, the search takes seconds and ends
    in errors on stderr. What the user chose in JAX_PLATFORMS stands.
    """
    chosen, libtpu = os.environ.get("JAX_PLATFORMS"), importlib.util.find_spec("libtpu")
    if chosen or not libtpu or machine.has_tpu():
        return
    from importlib import metadata

    plugins = {p.name for p in metadata.entry_points(group="jax_plugins")}
    cuda = any("cuda" in name for name in plugins)
    if cuda and machine.has_nvidia():
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    elif all("cuda" in name for name in plugins):
        os.environ["JAX_PLATFORMS"] = "cpu"


def fail(message: str) -> NoReturn:
    """Prints the message as one line on stderr and exits with code 2."""
    # One write: other threads may print, too.
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)


@contextlib.contextmanager
def ending(process: bool) -> Iterator[None]:
    """Ends the process with the block, if `process`, whatever is still compiled.

    Python would wait for programs that are compiled beside decoding, which may take
    half a minute. Only the first of them is waited for, once the work is done, and only
    if it is kept on disk: without it, commands that end soon would never get to use it.
    """
    try:
        yield
    except SystemExit as end:
        background = sys.modules.get("treespec_jax.engine.background")
        team = sys.modules.get("treespec_jax.distributed")
        # Other processes would take a sudden end for a failure.
        shared = team is not None and team.is_multiprocess()
        busy = background is not None and background.compiling()
        if not process or shared or not busy:
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        code = 0 if end.code is None else end.code
        if code == 0:
            _keep(background)
        os._exit(code if isinstance(code, int) else 1)


def _keep(background: ModuleType) -> None:
    """Lets a first program be compiled to its end; an interrupt ends the wait."""
    import jax

    firsts = background.firsts()
    if not jax.config.jax_compilation_cache_dir or not firsts:
        return
    note = "compiling a quicker program, kept for next time; Ctrl-C ends this …"
    print(note, file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for one in firsts:
            one.wait()


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the process as `run` says, whatever the block raises."""
    try:
        yield
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
        sys.exit(interrupts.EXIT_CODE)
    except Exception:
        if reason := _no_device():
            fail(reason)
        raise


def _no_device() -> str | None:
    """What is wrong with JAX_PLATFORMS, where jax finds no device of that kind."""
    chosen, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not chosen or jax is None:
        return None
    try:
        jax.devices()
    # jax fails an assertion where the first of its platforms is known and not there.
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split(" (set JAX_PLATFORMS")[0].split())
        reason = f" ({reason:.200})" if reason else ""
        return (
            f"JAX_PLATFORMS={chosen} names no device of this machine{reason}; take "
            "JAX_PLATFORMS=cpu, or leave the variable away"
        )
    return None


def _prepare_streams() -> None:
    """Lets any text be written, and bytes that are no text be read and then named.

    A process may also be started without some of its three streams.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # What the encoding lacks, ASCII for example, is written as an escape.
            how = "surrogateescape" if mode == "r" else "backslashreplace"
            stream.reconfigure(errors=how)


def _parse(argv: list[str], arguments: int) -> list[str]:
    """Parses flags; the rest. Raises UserError for anything wrong with them."""
    from absl import flags

    try:
        rest = flags.FLAGS(argv)
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
    if len(rest) > 1 + arguments:
        hint = "give --name=value (--help lists them)"
        if arguments:
            hint = f"besides flags {arguments} is taken at most"
        raise UserError(f"argument {rest[1 + arguments]!r} is not a flag; {hint}")
    return rest


def _drop_output() -> None:
    """Lets what is still buffered go nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
