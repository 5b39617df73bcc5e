"""Start-up of jax for the commands: quiet logs and a persistent compilation cache."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Iterator

from treespec_jax import disk_cache, distributed, interrupts
from treespec_jax.commands import flags
from treespec_jax.commands.settings import Experiment

# Seconds of silence that nobody minds.
_PATIENCE = 1.0


def set_up(compilation_cache: str | None = None) -> None:
    """Prepares jax; the first call that imports it.

    Args:
      compilation_cache: folder of the compilation cache; None: `treespec-jax` under the
        user's cache directory, unless jax's own variable names one; "": none. Of one
        that cannot be written, stderr gets a note.
    """
    with interrupts.ends_at_once():
        from treespec_jax import llm  # noqa: F401  What takes long, all in here.

    if compilation_cache is None:
        compilation_cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    note = disk_cache.use(compilation_cache)
    if note:
        print(f"note: {note}", file=sys.stderr)


def join(given, settings: Experiment) -> Experiment:
    """Joins the processes that --distributed stands for; before `set_up`.

    Args:
      given: values of the flags `flags.CLUSTER`.
      settings: of all of them.

    Returns:
      The settings, with a mesh of all devices where they name none.

    Raises:
      UserError: as `distributed.initialize`.
    """
    cluster = flags.cluster(given)
    if cluster is None:
        return settings
    import jax

    from treespec_jax.sharding import TENSOR

    same = json.dumps([settings.as_dict(), jax.__version__], default=str)
    _keep_stdout()
    with interrupts.ends_at_once():
        distributed.initialize(**dataclasses.asdict(cluster), settings=same)
    mesh = settings.mesh or f"{TENSOR}:{jax.device_count()}"
    return dataclasses.replace(settings, mesh=mesh)


def _keep_stdout() -> None:
    """Lets what libraries write to file 1 by themselves, as Gloo does, go to stderr."""
    sys.stdout.flush()
    own = dict(encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stdout = os.fdopen(os.dup(1), "w", **own)
    os.dup2(2, 1)


@contextlib.contextmanager
def says_compiling(shown: bool = True) -> Iterator[None]:
    """Says on stderr that programs are compiled, if the block takes over a second.

    Args:
      shown: whether anything is said.
    """
    import jax

    config = jax.config
    stays = config.jax_enable_compilation_cache and config.jax_compilation_cache_dir
    line = f"compiling{' (kept for next time)' if stays else ''} …"
    timer = threading.Timer(_PATIENCE, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    if shown:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
