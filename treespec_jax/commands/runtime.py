"""Start-up of jax for the commands: quiet logs and a persistent compilation cache."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from treespec_jax import disk_cache, interrupts

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
