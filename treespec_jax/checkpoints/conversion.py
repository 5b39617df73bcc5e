"""From any checkpoint to a native folder, in pieces that a kill does not undo.

The output grows in `.NAME.partial`, beside its place. `journal.jsonl` in there begins
with what is converted, and names every group of parameters that is written, with its
checksums; it is locked while a conversion runs. The next run with the same source and
settings checks those groups and goes on after them; one of another source or dtype
starts over. At the end the folder is renamed: what has the final name is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from treespec_jax.checkpoints.formats import Description
from treespec_jax.checkpoints.formats.native import PARAMS, check_files
from treespec_jax.checkpoints.placement import Parameters
from treespec_jax.checkpoints.saving import (
    Group,
    check_apart,
    check_output,
    check_replaced,
    finish,
    grouped,
    write_group,
    writing,
)
from treespec_jax.errors import UserError
from treespec_jax.models.weight_types import Types

_JOURNAL = "journal.jsonl"
_VERSION = 1
# As much of a file as its header takes; the rest is known by size and time.
_HEAD = 1 << 20
_HINT = "; the same command goes on from here once that is mended"


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
      types: of the parameters.
      parameters: how many numbers they hold.
      resumed: bytes of them that an earlier run had written.
    """

    types: Types
    parameters: int
    resumed: int


def convert(
    about: Description,
    output: str | Path,
    dtype: Any = None,
    weights: str | None = None,
    *,
    restart: bool = False,
    overwrite: bool = False,
    progress: Callable[[Sequence[Group]], Iterable[Group]] = iter,
) -> Converted:
    """Writes a checkpoint as a native folder, or goes on where the last run stopped.

    Holds one group of parameters, of 64 MB or one parameter, at a time.

    Args:
      about: the checkpoint, as `describe` gave it.
      output: the folder to make; an earlier native folder of the same model is
        replaced at the end.
      dtype: float32, bfloat16 or float16; None: as stored.
      weights: type of the matrices, see `models.weight_types`; None: that of `dtype`.
      restart: start over, whatever an earlier run left.
      overwrite: replace a folder of another model too.
      progress: wraps the list of groups, to show a bar.

    Raises:
      UserError: the checkpoint is damaged or not what its configuration says (then
        nothing is left behind), the output is the input, holds another model, cannot
        be written or is being written by another process (then what is there stays,
        for the next run).
    """
    path = Path(output).expanduser().absolute()
    check_output(path)
    check_apart(output, input=about.path)
    parameters = Parameters(about, dtype, weights=weights)
    origin = {"source": about.name, "inputs": inputs_of(parameters.source.files())}
    # Folders of floats name no type of weights.
    same = origin | {"weights": None, **parameters.types.on_file}
    same["model"] = dataclasses.asdict(about.config)
    check_replaced(path, same, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    groups = grouped(parameters.items)
    with writing(path, _HINT), _locked(partial) as file:
        journal = _Journal(file, partial, _fingerprint(about, parameters))
        if restart or not journal.goes_on():
            journal.start()
        resumed = sum(g.nbytes for g in groups if g.name in journal.done)
        for group in progress(groups):
            if group.name not in journal.done:
                try:
                    arrays = {i.path: parameters.read(i.path) for i in group.items}
                except UserError:
                    # The source is at fault: nobody will go on from here.
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                journal.add(group.name, write_group(partial, group.name, arrays))
        files = {
            name: sums for g in groups for name, sums in journal.done[g.name].items()
        }
        finish(partial, path, about, origin, parameters.types, files)
        (path / _JOURNAL).unlink()
    return Converted(parameters.types, parameters.count, resumed)


class _Journal:
    """What is written so far.

    Attributes:
      done: files of every group that is written, with their checksums.
    """

    def __init__(self, file: IO[str], partial: Path, header: dict[str, Any]):
        self._file = file
        self._partial = partial
        self._header = header
        self.done: dict[str, dict[str, list[int]]] = {}

    def goes_on(self) -> bool:
        """Takes up what an earlier run of the same conversion left, if there is one."""
        self._file.seek(0)
        records = []
        for line in self._file:
            # A kill may cut the last line short.
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        if not records or records[0] != self._header:
            return False
        params = self._partial / PARAMS
        for record in records[1:]:
            with contextlib.suppress(UserError):
                check_files(params, record["files"])
                self.done[record["group"]] = record["files"]
        for rest in params.glob("*"):
            if rest.name not in self.done:
                shutil.rmtree(rest)
        # What follows begins on a line of its own.
        self._file.write("\n")
        return True

    def start(self) -> None:
        """Forgets what there is."""
        self.done = {}
        for rest in self._partial.iterdir():
            if rest.is_dir():
                shutil.rmtree(rest)
            elif rest.name != _JOURNAL:
                rest.unlink()
        self._file.truncate(0)
        self._append(self._header)

    def add(self, group: str, files: dict[str, list[int]]) -> None:
        """Notes that a group is written."""
        self._append({"group": group, "files": files})
        self.done[group] = files

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[IO[str]]:
    """The journal, opened for one process alone; a kill opens it again."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _JOURNAL).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{partial} is being written by another conversion; wait for its end"
            ) from None
        yield file


def _fingerprint(about: Description, parameters: Parameters) -> dict[str, Any]:
    """What two runs must have in common for one to go on after the other."""
    fingerprint = {
        "version": _VERSION,
        "source": str(about.path.absolute()),
        **parameters.types.on_file,
        "model": dataclasses.asdict(about.config),
        "scales": parameters.scales and parameters.scales.digest,
        "groups": [[g.name, g.nbytes] for g in grouped(parameters.items)],
        "files": [_stamp(file) for file in parameters.source.files()],
    }
    return json.loads(json.dumps(fingerprint))


def inputs_of(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and CRC-32 of the head of each file: a copy has the same."""
    return [[name, size, crc] for name, size, _, crc in map(_stamp, files)]


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    with file.open("rb") as start:
        head = zlib.crc32(start.read(_HEAD))
    return [file.name, status.st_size, status.st_mtime_ns, head]
