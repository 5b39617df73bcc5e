"""The kinds of checkpoint that can be read, in the order in which they are asked.

A new kind takes a module here and a line in `FORMATS`. Importing this starts no jax.
"""

from __future__ import annotations

from pathlib import Path

from treespec_jax.checkpoints.formats.huggingface import HuggingFaceFormat
from treespec_jax.checkpoints.formats.llama2c import Llama2cFormat
from treespec_jax.checkpoints.formats.native import NativeFormat
from treespec_jax.checkpoints.formats.protocol import Description, Format, Header
from treespec_jax.errors import UserError

__all__ = ["FORMATS", "Description", "Format", "Header", "find_format"]

FORMATS: tuple[Format, ...] = (
    NativeFormat(),
    HuggingFaceFormat(),
    Llama2cFormat(),
)


def find_format(path: Path) -> Format:
    """The format of the checkpoint at `path`.

    Raises:
      UserError: the path is missing, or no format claims it.
    """
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; check the path")
    for known in FORMATS:
        if known.claims(path):
            return known
    *others, last = (known.expects for known in FORMATS)
    problem = "holds no checkpoint" if path.is_dir() else "is of an unknown kind"
    raise UserError(f"{path} {problem}; give {', '.join(others)} or {last}")
