"""The journal of a run: what it remembers, what it refuses, what it survives."""

from __future__ import annotations

import json

import pytest

from treespec_jax.errors import UserError
from treespec_jax.measurement.journal import FILE, Journal, first_difference

SETTINGS = {"seed": 1, "engine": {"max_len": None, "chunks": (4, 8)}, "name": "a"}
VERSIONS = {"jax": "0.10", "cpus": 2}


def started(folder, settings=SETTINGS, **more) -> Journal:
    journal = Journal(folder, settings, **more)
    journal.begin(VERSIONS, {"dtype": "float32"})
    return journal


def cell(number):
    return {"question": str(number), "round": 0}


def test_finished_cells_are_read_back(tmp_path):
    folder = tmp_path / "new" / "results"
    assert Journal(folder, SETTINGS).header is None and not folder.parent.exists()
    journal = started(folder)
    assert journal.find("answer", cell(1)) is None
    journal.add("answer", [(cell(n), {"tokens": [n, n]}) for n in (1, 2)])
    journal.add("step", [({"batch": 1}, {"seconds": 0.5})])
    again = Journal(folder, SETTINGS)
    assert again.header["dtype"] == "float32"
    for each in (journal, again):
        assert each.find("answer", cell(2))["tokens"] == [2, 2]
        assert each.find("step", cell(2)) is None
        assert [line["question"] for line in each.all("answer")] == ["1", "2"]
    lines = [json.loads(s) for s in (folder / FILE).read_text().splitlines()]
    assert lines[0]["settings"]["engine"] == {"max_len": None, "chunks": [4, 8]}
    assert lines[1] == {"kind": "answer", "cell": cell(1), "tokens": [1, 1]}


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    started(tmp_path).add("answer", [(cell(n), {}) for n in range(3)])
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    journal = Journal(tmp_path, SETTINGS)
    assert [line["question"] for line in journal.all("answer")] == ["0", "1"]
    assert file.read_bytes() == whole[:-4], "reading changes nothing"
    journal.begin(VERSIONS, {})
    journal.add("answer", [(cell(2), {})])
    assert file.read_bytes() == whole
    # Not even the header is whole.
    file.write_bytes(whole[:5])
    started(tmp_path)
    assert len(file.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_line_is_named(tmp_path, number):
    started(tmp_path).add("answer", [(cell(n), {}) for n in range(3)])
    lines = (tmp_path / FILE).read_text().splitlines()
    lines[number - 1] = '{"kind": "answer"}' if number > 1 else "[]"
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"{FILE}:{number} is damaged"):
        Journal(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 2}, "results of seed=1, not 2;"),
        ({"engine": {"max_len": 64, "chunks": (4, 8)}}, "engine.max_len=null, not 64"),
        ({"engine": {"max_len": None, "chunks": (4,)}}, r"chunks=\[4, 8\], not \[4\]"),
        ({"more": True}, "more=null, not true"),
        ({"name": "b"}, "name=a, not b"),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path, changes, expected):
    started(tmp_path).add("answer", [(cell(1), {})])
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=expected) as caught:
        Journal(tmp_path, {**SETTINGS, **changes})
    assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_results_of_other_versions_are_refused(tmp_path):
    started(tmp_path)
    journal = Journal(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="results of cpus=2, not 4"):
        journal.begin({**VERSIONS, "cpus": 4}, {})


def test_results_without_a_journal_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="results of another command"):
        Journal(tmp_path, SETTINGS)
    started(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_overwriting_waits_until_something_is_measured(tmp_path):
    started(tmp_path).add("answer", [(cell(1), {})])
    (tmp_path / "results.md").write_text("old")
    other = Journal(tmp_path, {"seed": 2}, overwrite=True)
    assert Journal(tmp_path, SETTINGS).find("answer", cell(1))
    other.begin(VERSIONS, {})
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert Journal(tmp_path, {"seed": 2}).all("answer") == []


def test_the_first_difference_is_that_of_the_new_order():
    assert first_difference({"a": 1, "b": 2}, {"b": 3, "a": 4}) == ("b", 2, 3)
    assert first_difference({"a": {"x": 1}}, {"a": {"x": 1}}) is None
    assert first_difference({"a": 1}, {}) == ("a", 1, None)
