"""Whole runs: they learn, resume to the bit, distil, and refuse bad input."""

from __future__ import annotations

import copy
import csv
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from treespec_jax import checkpoints
from treespec_jax.errors import UserError
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.training import data, loop, measure, vocabulary

pytestmark = pytest.mark.slow


def _parameters(path):
    return FlatModule(checkpoints.load(path, dtype=jax.numpy.float32).model).leaves


def _at(values, output, **run):
    values = copy.deepcopy(values)
    values["run"] |= {"output": str(output), **run}
    return values


def _curve(folder):
    with open(folder / "loss.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def finished(text_path, tmp_path_factory):
    """Folder and result of an uninterrupted run; filled by the first test."""
    return {}


def _whole_run(finished, values, build, tmp_path_factory):
    if not finished:
        folder = tmp_path_factory.mktemp("whole")
        finished["folder"] = folder
        finished["result"] = loop.train(build(_at(values, folder)))
    return finished["folder"], finished["result"]


def test_learns(finished, values, build, tmp_path_factory):
    folder, result = _whole_run(finished, values, build, tmp_path_factory)
    assert result.finished and result.step == 12
    curve = _curve(folder)
    assert [int(row["step"]) for row in curve] == list(range(1, 13))
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"]) - 1
    held_out = [float(row["held_out_loss"]) for row in curve if row["held_out_loss"]]
    assert len(held_out) == 3
    assert result.held_out == pytest.approx(min(held_out), abs=1e-4)
    assert result.sample.startswith("anna")
    assert (folder / "loss.png").stat().st_size > 1000
    loaded = checkpoints.load(result.model_path)
    assert loaded.config.vocab_size == 320
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("a\n🐉")) == "a\n🐉"


def _stop_by(how, monkeypatch, at):
    """Makes the run meet a signal or a crash when it asks for the batch `at`."""
    plain = data.Batches.__getitem__

    def get(self, step):
        if step == at:
            if how == "crash":
                raise MemoryError("killed here")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step)

    monkeypatch.setattr(data.Batches, "__getitem__", get)


@pytest.mark.parametrize("how", ["limit", "signal", "crash"])
def test_resumes_to_the_bit(
    how, finished, values, build, tmp_path, monkeypatch, tmp_path_factory
):
    folder, whole = _whole_run(finished, values, build, tmp_path_factory)
    cut = tmp_path / "cut"
    # After a crash the last step that was saved counts; the others save at the end.
    minutes = 0.0 if how == "crash" else 60.0
    settings = _at(values, cut, save_minutes=minutes)
    with monkeypatch.context() as patch:
        if how == "limit":
            first = loop.train(build(_at(settings, cut, stop_after=7)))
        else:
            _stop_by(how, patch, 6)
            if how == "crash":
                with pytest.raises(MemoryError):
                    loop.train(build(settings))
                # A kill in the middle of a save leaves this behind.
                (cut / "newest" / "step_00000007.partial").mkdir()
                first = None
            else:
                first = loop.train(build(settings))
    if first is not None:
        assert not first.finished and first.step == 7
        assert first.model_path is None
    result = loop.train(build(settings))
    assert result.finished
    for a, b in zip(
        _parameters(whole.model_path), _parameters(result.model_path), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert _curve(cut) == _curve(folder)
    assert [p.name for p in (cut / "newest").iterdir()] == ["step_00000012"]
    # A run that is complete is exported again, not trained again.
    assert loop.train(build(settings)).held_out == result.held_out


def test_distillation_comes_closer_to_the_teacher(
    finished, values, build, tmp_path, tmp_path_factory
):
    _, teacher = _whole_run(finished, values, build, tmp_path_factory)
    path = str(teacher.model_path)
    values["vocabulary"] = {"path": path}
    values["distill"] = {"teacher": path, "weight": 1.0}
    values["model"]["mlp_dim"] = 32
    settings = build(_at(values, tmp_path, save_minutes=60.0, eval_every=12))
    result = loop.train(settings)
    assert 0 <= result.agreement.top1 <= result.agreement.top4 <= 1

    target, student = (
        checkpoints.load(p, dtype=jax.numpy.float32) for p in (path, result.model_path)
    )
    untrained = Transformer(student.config, rngs=nnx.Rngs(settings.seed))
    documents = [data.read_documents(source) for source in settings.data.sources]
    tokenizer = vocabulary.load(tmp_path)
    rows = data.load_rows(settings.data, documents, tokenizer.encode)
    before = measure.agreement(
        FlatModule(target.model), FlatModule(untrained), rows.held_out, 2
    )
    assert result.agreement.positions == before.positions
    assert result.agreement.kl < 0.7 * before.kl


def test_a_model_agrees_with_itself(tiny_target):
    flat = FlatModule(tiny_target)
    rows = np.random.default_rng(0).integers(3, 97, (3, 17))
    found = measure.agreement(flat, flat, rows, 2)
    assert (found.top1, found.top4, found.positions) == (1.0, 1.0, 32)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_refuses_to_mix_runs(finished, values, build, text, tmp_path, tmp_path_factory):
    folder, _ = _whole_run(finished, values, build, tmp_path_factory)
    other = tmp_path / "other.model"
    other.write_bytes(vocabulary.train([text], 300))
    values["vocabulary"] = {"path": str(other)}
    with pytest.raises(UserError, match="holds a run with another vocabulary"):
        loop.train(build(_at(values, folder)))
    values["vocabulary"] = {}
    values["optimizer"]["peak"] = 5e-2
    with pytest.raises(UserError, match=r"optimizer\.peak=0\.01, not 0\.05"):
        loop.train(build(_at(values, folder)))


def test_bad_settings(values, build, tmp_path):
    def fails(match, **changes):
        broken = _at(values, tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        for part, change in changes.items():
            broken[part] = {**broken.get(part, {}), **change}
        with pytest.raises(UserError, match=match) as caught:
            loop.train(build(broken))
        assert "\n" not in str(caught.value)

    fails("unknown key 'bach_rows' in data; did you mean", data={"bach_rows": 1})
    fails("is not a multiple of micro_rows=3", data={"micro_rows": 3})
    fails("batch_rows=4000 exceeds", data={"batch_rows": 4000})
    fails("exceeds model.max_positions=64", data={"row_tokens": 65})
    fails("no text to train on", data={"sources": {}})
    fails("warmup=12 must be below steps=12", optimizer={"warmup": 12})
    fails("peak must be a finite number", optimizer={"peak": float("nan")})
    fails("no output folder", run={"output": ""})
    fails("cannot read the vocabulary", vocabulary={"path": str(tmp_path / "no")})
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    fails("cannot write to .*file", run={"output": str(nowhere)})
    fails("/no", distill={"teacher": str(tmp_path / "no")})


def test_bad_pattern(values, build, text_path):
    values["data"]["sources"]["tales"]["separator"] = "("
    with pytest.raises(UserError, match=r"bad pattern '\('"):
        build(values)
    assert pathlib.Path(text_path).exists()
