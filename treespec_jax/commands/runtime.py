"""Start-up of jax for the commands: quiet logs and a persistent compilation cache."""

from __future__ import annotations

import os
from pathlib import Path


def set_up(compilation_cache: str | None = None) -> None:
    """Prepares jax; the first call that imports it.

    Args:
      compilation_cache: folder of the compilation cache; None: `treespec-jax` under the
        user's cache directory, unless jax's own variable names one; "": none.
    """
    # Loading a cached program on a CPU logs its list of machine features as errors.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    if compilation_cache == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if compilation_cache is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    else:
        folder = compilation_cache or default_cache_folder()
    if _writable(Path(folder).expanduser()):
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(folder).expanduser().absolute())
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def default_cache_folder() -> Path:
    """`treespec-jax` under $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "treespec-jax"


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(folder, os.W_OK | os.X_OK)
