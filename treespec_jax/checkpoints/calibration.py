"""The tau fitted for a drafter, kept beside its weights. Light: no jax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import check_writable, write_whole
from treespec_jax.checks import check_float
from treespec_jax.errors import UserError

NAME = "calibration.json"


def read_tau(checkpoint: str | Path) -> float | None:
    """The tau stored in a checkpoint's folder; None if there is none.

    Raises:
      UserError: the file cannot be read or holds no tau.
    """
    file = Path(checkpoint).expanduser() / NAME
    if not file.is_file():
        return None
    try:
        tau = json.loads(file.read_text())["tau"]
        if isinstance(tau, (bool, str)):
            raise TypeError
        check_float("tau", tau, 0, open_low=True)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        raise UserError(
            f"{file} does not hold a tau above 0; fit it again with "
            "scripts/calibrate_drafter.py, or delete the file"
        ) from None
    return float(tau)


def output_file(checkpoint: str | Path, output: str | Path | None) -> Path:
    """The file to write to, known to be writable.

    Args:
      checkpoint: of the drafter.
      output: a file to write instead of the one beside the weights.

    Raises:
      UserError: there is no folder of the drafter's own, or none that can be written.
    """
    path = Path(checkpoint).expanduser()
    if output:
        file = Path(output).expanduser()
    elif path.is_dir():
        file = path / NAME
    else:
        raise UserError(
            f"{path} is a file, so that nothing can be kept beside it; give "
            "--output=FILE"
        )
    check_writable(file, "give --output=FILE in another folder")
    return file


def write(file: Path, values: Mapping[str, Any]) -> None:
    """Writes all of a calibration, or nothing.

    Raises:
      UserError: the folder cannot be written.
    """
    data = json.dumps(dict(values), indent=2) + "\n"
    write_whole(file, data.encode(), "give --output=FILE")
