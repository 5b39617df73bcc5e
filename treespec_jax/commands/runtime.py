"""Start-up of jax for the commands: quiet logs and a persistent compilation cache."""

from __future__ import annotations

import os
import sys

from treespec_jax import disk_cache, interrupts


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
