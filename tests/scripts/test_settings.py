"""Settings of experiments, and the parts of the benchmark that need no model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from treespec_jax import limits
from treespec_jax.checkpoints import files
from treespec_jax.commands import loading, prompts, runtime, settings
from treespec_jax.errors import UserError
from treespec_jax.measurement import output, tables, timing

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize(
    "path",
    [p for p in CONFIGS if not p.name.startswith("train_")],
    ids=lambda path: path.stem,
)
def test_every_configuration_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings.build(module.get_config())


def test_defaults_survive_a_round_trip():
    plain = settings.build()
    assert settings.build(settings.default_config()) == plain
    assert settings.build(json.loads(json.dumps(plain.as_dict()))) == plain


def test_overrides_win_and_none_is_not_given():
    built = settings.build(
        {"speculative": {"tree": "chain:2"}, "sampling": {"top_k": 3, "seed": 4}},
        {"speculative.tree": None, "sampling.seed": 5, "engine.max_batch": 2},
    )
    assert built.speculative.tree == "chain:2"
    assert (built.sampling.top_k, built.sampling.seed) == (3, 5)
    assert built.engine.max_batch == 2 and built.engine.max_len is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"leaf": 1}, "leaf"),
        ({"sampling": {"leaf": 1}}, "leaf"),
        ({"sampling": 3}, "sampling"),
        ({"engine": {"prefill_chunks": "x"}}, "prefill_chunks"),
        ({"speculative": {"tree": 5}}, "tree"),
        ({"speculative": {"tau": 0}}, "tau"),
        (
            {"speculative": {"tree": "chain:9"}, "engine": {"max_len": 8}},
            "max_len=8",
        ),
        ({"benchmark": {"rounds": 0}}, "rounds"),
        ({"benchmark": {"shapes": ()}}, "--shapes"),
        ({"benchmark": {"methods": ("x",)}}, "method 'x' is unknown"),
        ({"benchmark": {"batches": (1.5,)}}, "batches"),
        ({"benchmark": {"chat_options": (1,)}}, "benchmark"),
        ({"benchmark": {"shapes": ("chain:0",)}}, "chain:0"),
    ],
)
def test_bad_values_are_named(values, expected):
    with pytest.raises(UserError, match=expected):
        settings.build(values)


def test_bundled_pair_is_the_default():
    for given in ({}, {"target": ""}):
        found = settings.build(given).with_paths(needs_drafter=True)
        assert found.target == "tinystories-5m"
        assert found.speculative.model == "tinystories-630k"
        plain = settings.build(given).with_paths(needs_drafter=False)
        assert plain.speculative.model is None


def test_a_drafter_is_chosen_for_a_name_alone(tmp_path, monkeypatch):
    """By the catalogue, unless the user says what drafts."""
    monkeypatch.chdir(tmp_path)
    name = "tinystories-5m"

    def drafter(**speculative):
        built = settings.build({"target": name, "speculative": speculative}).speculative
        return limits.resolve(built).method, built.model

    assert drafter() == ("draft_model", "tinystories-630k")
    assert drafter(method="draft_model") == ("draft_model", "tinystories-630k")
    assert drafter(model="some/draft") == ("draft_model", "some/draft")
    for method in ("none", "auto"):
        assert drafter(method=method) == (method, None)
    # A folder of that name is another model.
    (tmp_path / name).mkdir()
    assert drafter() == ("auto", None)


def test_what_is_missing_is_named(tmp_path):
    for field, what in (("target", "target"), ("tokenizer", "tokenizer")):
        experiment = settings.build({field: str(tmp_path / "gone")})
        with pytest.raises(UserError, match=f"no {what} at .*gone; check the path"):
            experiment.with_paths()
    near = settings.build({"target": "smollm2-135-instruct"})
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-instruct'"):
        near.with_paths()


def test_a_recycle_table_goes_with_methods_that_have_one():
    given = {"method": "auto", "recycle_table": "t.npz"}
    made = settings.build({"speculative": given})
    assert made.with_tree("chain:2").speculative.recycle_table == "t.npz"
    for other, kept in (("recycle", "t.npz"), ("ngram", ""), ("draft_model", "")):
        changed = made.with_tree("chain:2", method=other)
        assert changed.speculative.recycle_table == kept
    assert made.with_tree("none").speculative.recycle_table == ""


class Saving:
    """An `LLM` as far as `keeping_table` looks."""

    def __init__(self, recycle_table, error=None):
        self.recycle_table, self._error, self.saved = recycle_table, error, 0

    def save_recycle_table(self):
        self.saved += 1
        if self._error:
            raise self._error


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("ended", [None, KeyboardInterrupt, RuntimeError])
def test_a_recycle_table_is_written_however_a_run_ends(ended, full, capsys):
    """What ended the run is raised; that the disk is full, if nothing else did."""
    llm = Saving("t.npz", UserError("disk full") if full else None)
    raised = ended or (UserError if full else None)
    expected = pytest.raises(raised) if raised else contextlib.nullcontext()
    with expected, loading.keeping_table(llm):
        if ended:
            raise ended("it")
    assert llm.saved == 1
    noted = "no recycle table was written: disk full" in capsys.readouterr().err
    assert noted == bool(ended and full)


def test_without_a_file_no_recycle_table_is_written():
    llm = Saving(None)
    with loading.keeping_table(llm):
        pass
    assert llm.saved == 0


def test_in_turn_rotates_and_keeps_pairs():
    order = []

    def program(name):
        def run():
            order.append(name)
            return float(len(order))

        return run

    seconds = timing.in_turn({n: program(n) for n in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert seconds == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_output_is_whole_or_absent(tmp_path):
    final = tmp_path / "deep" / "results"
    with pytest.raises(RuntimeError), output.folder(str(final)) as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with output.folder(str(final)) as work:
            (work / "whole").write_text(text)
        assert [p.name for p in final.iterdir()] == ["whole"]
        assert (final / "whole").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_a_study_measures_once_and_writes_all(tmp_path, capsys):
    calls = []
    study = output.Study(
        lambda: {"calls": calls.append(1) or len(calls)},
        lambda results: f"{results['calls']} call",
        lambda results, path: path.write_bytes(b"png"),
    )
    with pytest.raises(UserError, match="--output"):
        study.carry_out("")
    assert calls == []
    study.carry_out(str(tmp_path / "results"))
    assert calls == [1]
    assert (tmp_path / "results" / "results.md").read_text() == "1 call\n"
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == {
        "calls": 1
    }
    assert (tmp_path / "results" / "results.png").read_bytes() == b"png"
    assert capsys.readouterr().out.count("1 call") == 1
    study.carry_out("", must_write=False)
    assert capsys.readouterr().out == "2 call\n"
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("path", ["", "/dev/null", "/dev/null/results"])
def test_unwritable_output(path):
    with pytest.raises(UserError, match="output"), output.folder(path):
        pass


def test_built_in_prompts_are_short_lower_case_stories():
    assert len(prompts.STORIES) == 8
    assert all(p == p.lower() and len(p) < 80 for p in prompts.STORIES)


def test_tables_line_up():
    rows = [("shape", "tok/s"), ("none", "1"), ("chain:3", "20.5")]
    lengths = {len(line) for line in tables.markdown(rows).splitlines()}
    assert len(lengths) == 1
    assert tables.markdown(rows, words=2).splitlines()[1] == "| ------- | ----- |"
    assert tables.aligned(rows).splitlines()[1] == "none         1"
    assert tables.percents([0.5, 0.254]) == "50 25 %"


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "treespec-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "treespec-jax"


def test_unwritable_cache_folder_is_left_alone(compilation_cache):
    before = jax.config.jax_compilation_cache_dir
    runtime.set_up("/dev/null/cache")
    assert jax.config.jax_compilation_cache_dir == before
