"""Compiled programs on disk, so that a program is compiled once for a machine.

jax has one such cache for a whole process: the latest choice holds for all of it.
"""

from __future__ import annotations

import os
from pathlib import Path

from treespec_jax.checkpoints.files import cache_folder
from treespec_jax.errors import UserError

# Loading a cached program on a CPU logs its list of machine features as errors.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def use(choice: str | Path | bool | None) -> str:
    """Chooses where compiled programs are kept; imports jax.

    Args:
      choice: a folder; True: `treespec-jax` under the user's cache directory, or what
        JAX_COMPILATION_CACHE_DIR names; None: the same, unless this process has set
        up jax's cache before, or turned it off; "" or False: none.

    Returns:
      a note for the user if the folder cannot be written, else "". What was in use
      before stays so then.

    Raises:
      UserError: a choice of another kind.
    """
    import jax

    if choice is not None and not isinstance(choice, (str, Path, bool)):
        raise UserError(
            f"compilation_cache must be a folder, True, False or None, got "
            f"{choice!r:.60}"
        )
    if choice in ("", False):
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    chosen = jax.config.jax_compilation_cache_dir
    if choice is None and (chosen or not jax.config.jax_enable_compilation_cache):
        return ""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = choice if isinstance(choice, (str, Path)) else named or cache_folder()
    folder = Path(folder).expanduser().absolute()
    if not _writable(folder):
        if not chosen:
            # Nothing in this process shall try another folder, which nobody named.
            jax.config.update("jax_enable_compilation_cache", False)
        return (
            f"compiled programs are not kept: {folder} cannot be written; name another "
            "folder by compilation_cache"
        )
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if chosen != str(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        _reopen()
    return ""


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError):
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _reopen() -> None:
    """A cache that was opened under another name stays in use else."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
