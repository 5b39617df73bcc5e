"""A journal of finished measurements, from which an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from treespec_jax.errors import UserError

FILE = "runs.jsonl"
_RESULTS = ("results.json", "results.md", "results.png")

# What tells one measurement from the others of its kind, as plain values.
Cell = Mapping[str, Any]


class Journal:
    """JSON lines in a folder of results: a header, then a line per measurement.

    The header holds the settings, the versions and further details. Another line is
    {"kind": …, "cell": {…}, …} with the measured values behind. For example

      journal = Journal(Path("out"), {"seed": 1})
      journal.begin({"jax": "0.10"}, {})
      if journal.find("answer", {"question": "1"}) is None:
          journal.add("answer", [({"question": "1"}, {"seconds": 2.5})])

    Args:
      folder: made by `begin`.
      settings: plain values that decide what is measured.
      overwrite: forget what the folder holds; its files are removed by `begin`.

    Attributes:
      header: of the file that is there, or None.

    Raises:
      UserError: the folder holds results of other settings or of another command, or a
        damaged journal.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite=False):
        self._file = folder / FILE
        self._settings = _plain(settings)
        self._overwrite = overwrite
        self._lines: dict[str, dict[str, Any]] = {}
        # Bytes of whole lines; an interrupted process may leave a part of one.
        self._whole = 0
        self.header: dict[str, Any] | None = None
        if overwrite:
            return
        if self._file.exists():
            self._read()
            self._check("settings", self._settings)
        else:
            for name in _RESULTS:
                if (folder / name).exists():
                    raise UserError(
                        f"{folder} holds {name} and no {FILE}: results of another "
                        "command; choose another --output, or --overwrite"
                    )

    def begin(self, versions: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Makes the folder and its header, or goes on with those that are there.

        Args:
          versions: of the machine and its programs; they decide the figures too.
          details: further values for the header.

        Raises:
          UserError: earlier lines were measured with other versions.
        """
        if self.header is not None:
            self._check("versions", _plain(versions))
            with self._file.open("rb+") as file:
                file.truncate(self._whole)
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            for name in _RESULTS:
                (self._file.parent / name).unlink(missing_ok=True)
        given = {"settings": self._settings, "versions": versions, **details}
        self.header = _plain({"kind": "header", **given})
        with self._file.open("w", encoding="utf-8") as file:
            file.write(_line(self.header))

    def find(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        """The cell and the values of a measurement, or None if it is not done."""
        return self._lines.get(_key(kind, cell))

    def add(
        self, kind: str, measured: Iterable[tuple[Cell, Mapping[str, Any]]]
    ) -> None:
        """Writes measurements that belong together; they are there all or not at all.

        Unless the process ends while it writes: then those before the end are there.
        """
        lines = [
            _plain({"kind": kind, "cell": cell, **values}) for cell, values in measured
        ]
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, lines)))
        for line in lines:
            self._enter(line)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Cells and values of all measurements of a kind, in order."""
        return [line for line in self._lines.values() if line["kind"] == kind]

    def _enter(self, line: dict[str, Any]) -> None:
        values = {k: v for k, v in line.items() if k != "cell"}
        self._lines[_key(line["kind"], line["cell"])] = {**line["cell"], **values}

    def _read(self) -> None:
        data = self._file.read_bytes()
        self._whole = data.rfind(b"\n") + 1
        for number, text in enumerate(data[: self._whole].splitlines(), 1):
            try:
                line = json.loads(text)
                if number > 1:
                    self._enter(line)
                else:
                    named = {name: line[name] for name in ("settings", "versions")}
                    self.header = {**line, **named}
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._file}:{number} is damaged; remove the line, or --overwrite"
                ) from None

    def _check(self, what: str, wanted: Mapping[str, Any]) -> None:
        """Raises UserError unless the header holds these values."""
        if self.header is None:
            return
        found = first_difference(self.header[what], wanted)
        if found is not None:
            name, old, new = found
            raise UserError(
                f"{self._file.parent} holds results of {name}={_shown(old)}, not "
                f"{_shown(new)}; choose another --output, or --overwrite"
            )


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and values of the first setting that differs; None if none does.

    What one side lacks is None.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (name, old, new)
    for key in dict.fromkeys([*new, *old]):
        dotted = f"{name}.{key}".lstrip(".")
        found = first_difference(old.get(key), new.get(key), dotted)
        if found is not None:
            return found
    return None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(values))


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _key(kind: str, cell: Cell) -> str:
    return json.dumps([kind, cell], sort_keys=True)
