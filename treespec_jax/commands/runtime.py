"""Start-up of jax for the commands: quiet logs and a persistent compilation cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from treespec_jax import interrupts
from treespec_jax.checkpoints.files import cache_folder


def set_up(compilation_cache: str | None = None) -> None:
    """Prepares jax; the first call that imports it.

    Args:
      compilation_cache: folder of the compilation cache; None: `treespec-jax` under the
        user's cache directory, unless jax's own variable names one; "": none.
    """
    # Loading a cached program on a CPU logs its list of machine features as errors.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with interrupts.ends_at_once():
        import jax

        from treespec_jax import llm  # noqa: F401  What takes long, all in here.

    if compilation_cache == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    chosen = compilation_cache or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(chosen or cache_folder()).expanduser().absolute()
    with contextlib.suppress(OSError, RuntimeError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
