"""A measurement, and its folder of results that is there whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from treespec_jax.errors import UserError


@contextlib.contextmanager
def folder(path: str) -> Iterator[Path]:
    """Gives a temporary folder beside `path` and moves its files there at the end.

    If the block raises, nothing of it stays.

    Raises:
      UserError: `path` is empty or cannot be written; found before the block runs.
    """
    final = check_folder(path)
    try:
        beside = final.parent
        while not beside.exists():
            beside = beside.parent
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=beside))
    except OSError as error:
        raise UserError(f"output {path}: {error.strerror}; choose another") from None
    try:
        yield work
        final.mkdir(parents=True, exist_ok=True)
        for file in sorted(work.iterdir()):
            os.replace(file, final / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_folder(path: str) -> Path:
    """The absolute path of a folder of results, which need not exist.

    Raises:
      UserError: `path` is empty, or something else is there.
    """
    if not path:
        raise UserError("no output folder: give --output=FOLDER")
    final = Path(path).expanduser().absolute()
    try:
        there = final
        while not there.exists():
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise NotADirectoryError(None, "not a folder that can be written")
    except OSError as error:
        raise UserError(f"output {path}: {error.strerror}; choose another") from None
    return final


@dataclasses.dataclass
class Study:
    """A measurement, and how its results are shown.

    For example `Study(lambda: {"seconds": 3}, lambda r: "| 3 s |").carry_out("out")`.

    Attributes:
      measure: measures everything; returns plain values for JSON.
      table: Markdown text of these values.
      plot: writes these values to a PNG file; None: there is no plot.
      results: the values, once it has run.
    """

    measure: Callable[[], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None] | None = None
    results: dict[str, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Measures."""
        self.results = self.measure()
        return self.results

    def write(self, work: Path) -> None:
        """Writes results.json, results.md and, with a plot, results.png."""
        (work / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
        (work / "results.md").write_text(self.table(self.results) + "\n")
        if self.plot and importlib.util.find_spec("matplotlib"):
            self.plot(self.results, work / "results.png")

    def carry_out(self, path: str, must_write: bool = True) -> None:
        """Runs, writes the results to a folder, all or none, and prints their table.

        Args:
          path: of the folder.
          must_write: without it, `path` may be empty: then nothing is written.

        Raises:
          UserError: no folder is named, or it cannot be written; found before anything
            is measured.
        """
        writes = bool(path) or must_write
        with folder(path) if writes else contextlib.nullcontext() as work:
            if self.plot and not importlib.util.find_spec("matplotlib"):
                say("no plot: matplotlib is missing; pip install 'treespec-jax[train]'")
            self.run()
            if writes:
                self.write(work)
        print(self.table(self.results))
        if writes:
            print(f"\nwrote {Path(path) / 'results.md'}, results.json beside it")


def say(line: str) -> None:
    """Tells a person how far it is, on stderr."""
    print(line, file=sys.stderr, flush=True)
