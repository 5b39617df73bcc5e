"""A measurement from its start to a folder of results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treespec_jax.measurement import output


@dataclasses.dataclass
class Study:
    """Something to measure, and how to show it.

    For example `Study(lambda: {"seconds": 3}, lambda results: "| 3 s |")`.

    Attributes:
      measure: measures everything; returns plain values for JSON.
      table: Markdown text of these values.
      plot: writes these values to a PNG file; None: there is no plot.
    """

    measure: Callable[[], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    plot: Callable[[dict[str, Any], Path], None] | None = None
    _results: dict[str, Any] | None = dataclasses.field(default=None, init=False)

    def run(self) -> None:
        """Measures, and keeps the results."""
        self._results = self.measure()

    def results(self) -> dict[str, Any]:
        """The measured values; runs first what has not run yet."""
        if self._results is None:
            self.run()
        return self._results

    def text(self) -> str:
        """The results as Markdown."""
        return self.table(self.results())

    def write(self, folder: str) -> None:
        """Writes results.json, results.md and perhaps results.png, all or none.

        Whether the folder can be written is found before anything is measured.

        Raises:
          UserError: no folder is named, or it cannot be written.
        """
        with output.folder(folder) as work:
            draws_plot = self.plot is not None and output.can_plot()
            results = self.results()
            (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            (work / "results.md").write_text(self.text() + "\n")
            if draws_plot:
                self.plot(results, work / "results.png")


def carry_out(study: Study, folder: str, must_write: bool = True) -> None:
    """Runs a study, writes it to a folder (see `Study.write`) and prints its table.

    Without `must_write` the folder may be empty: then nothing is written.
    """
    if folder or must_write:
        study.write(folder)
    print(study.text())
    if folder:
        print(f"\nwrote {Path(folder) / 'results.md'}, results.json beside it")
