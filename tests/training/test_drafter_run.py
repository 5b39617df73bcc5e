"""Whole trainings of drafters: what they change, how they resume, what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from flax import nnx

from tests.training import drafters
from tests.training.drafters import METHODS, answers, config, loaded
from treespec_jax.errors import UserError
from treespec_jax.training import drafter_data, drafter_loop
from treespec_jax.training.drafter_trainer import Trainer
from treespec_jax.training.store import Store


def named(model) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in state}


@pytest.mark.parametrize("method", METHODS)
def test_steps_lower_the_loss_and_leave_the_target_alone(method, tiny_target):
    few = 0 if method == "draft_model" else 41
    settings = config(method, drafter={"vocab": few})
    rows, _ = answers().rows(drafters.T, 0.2)
    trainer = Trainer(settings, loaded(tiny_target), rows)
    state, losses = trainer.init(), []
    untrained = named(trainer.trained(state.leaves))
    target = named(tiny_target)
    batch = drafter_data.take(rows, np.arange(4))
    for _ in range(8):
        state, loss = trainer.step(state, batch, 1e-2)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, losses
    trained = named(trainer.trained(state.leaves))
    same = {name for name in trained if np.array_equal(trained[name], untrained[name])}
    shared = {"medusa": {"head", "token_ids"}, "draft_model": set()}
    assert same == shared.get(method, {"embedding", "head", "token_ids"})
    if few:
        ids = trained["token_ids"]
        assert len(set(ids.tolist())) == few and (np.diff(ids) > 0).all()
        np.testing.assert_array_equal(trained["head"], target["head"][ids])
        written = np.bincount(rows.tokens[rows.written], minlength=97)
        assert written[ids].min() >= np.delete(written, ids).max()
    for name, value in named(tiny_target).items():
        np.testing.assert_array_equal(value, target[name])


def run(settings, tiny_target):
    return drafter_loop.train(settings, loaded(tiny_target), answers())


def curve(folder) -> list[dict]:
    with open(folder / "loss.csv", newline="") as f:
        return list(csv.DictReader(f))


def leaves(folder, settings, tiny_target) -> list[np.ndarray]:
    """All of the newest state: parameters, moments and the step."""
    rows, _ = drafter_data.load(settings.data, loaded(tiny_target), answers())
    like = Trainer(settings, loaded(tiny_target), rows).init()
    found = Store(folder / "newest").restore(like)
    return [np.asarray(x) for x in (*found.leaves, *jax.tree.leaves(found.optimizer))]


@pytest.fixture(scope="module")
def whole(tiny_target, tmp_path_factory):
    """Folder, settings and result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    settings = config("eagle3", folder)
    return folder, settings, run(settings, tiny_target)


@pytest.mark.slow
def test_a_run_learns_and_says_what_it_cost(whole):
    folder, settings, result = whole
    assert result.finished and result.step == 8
    table = curve(folder)
    assert [int(row["step"]) for row in table] == list(range(1, 9))
    assert float(table[-1]["loss"]) < float(table[0]["loss"]) - 0.1
    told = json.loads((folder / "cost.json").read_text())
    tokens = 8 * 4 * drafters.T
    assert told["cost"]["tokens"] == tokens == int(table[-1]["tokens"])
    assert told["cost"]["steps"] == 8 and told["cost"]["flops"] > tokens
    measured = [row for row in table if row["held_out_loss"]]
    assert [row["step"] for row in measured] == ["4", "8"]
    losses = [float(row["held_out_loss"]) for row in measured]
    assert told["after"]["loss"] == pytest.approx(min(losses), abs=1e-4)
    assert told["before"]["loss"] > told["after"]["loss"]
    # Three predictions: no deeper shape can be measured.
    assert set(told["after"]["tokens_per_step"]) == {"chain:3", "regular:3x2x1"}
    best = next(row for row in measured if int(row["step"]) == told["best_step"])
    for name, value in told["after"]["tokens_per_step"].items():
        assert 1 <= value <= 4
        assert float(best[name]) == pytest.approx(value, abs=1e-4)
    assert best["chain:5"] == ""
    assert (folder / "loss.png").stat().st_size > 1000
    text = "\n".join(result.report.lines())
    assert f"{tokens:,} tokens in 8 steps" in text and "regular:3x2x1" in text


def stop_by(how, monkeypatch, at):
    """Makes the run meet a signal or a crash when it asks for the batch `at`."""
    plain = drafter_data.Batches.__getitem__

    def get(self, step):
        if step == at:
            if how == "crash":
                raise MemoryError("killed here")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step)

    monkeypatch.setattr(drafter_data.Batches, "__getitem__", get)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["limit", "signal", "crash"])
def test_resumes_to_the_bit(how, whole, tiny_target, tmp_path, monkeypatch):
    folder, settings, result = whole
    # After a crash the last step that was saved counts; the others save at the end.
    minutes = 0.0 if how == "crash" else 60.0
    settings = config("eagle3", tmp_path, run={"save_minutes": minutes})
    with monkeypatch.context() as patch:
        if how == "limit":
            limited = config("eagle3", tmp_path, run={"stop_after": 5})
            assert run(limited, tiny_target).step == 5
        else:
            stop_by(how, patch, 4)
            if how == "crash":
                with pytest.raises(MemoryError):
                    run(settings, tiny_target)
                # A kill in the middle of a save leaves this behind.
                (tmp_path / "newest" / "step_00000005.partial").mkdir()
            else:
                first = run(settings, tiny_target)
                assert (first.finished, first.step, first.path) == (False, 5, None)
    again = run(settings, tiny_target)
    assert again.finished
    for a, b in zip(
        leaves(folder, settings, tiny_target),
        leaves(tmp_path, settings, tiny_target),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert curve(tmp_path) == curve(folder)
    assert again.report.after == result.report.after
    assert again.report.before == result.report.before


@pytest.fixture
def clock(monkeypatch):
    """A clock on which every batch takes a minute; and the rates of the steps."""
    now, rates = [0.0], []
    get, step = drafter_data.Batches.__getitem__, Trainer.step

    def slow(self, index):
        now[0] += 60.0
        return get(self, index)

    def noted(self, state, rows, rate):
        rates.append(float(rate))
        return step(self, state, rows, rate)

    fake = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(drafter_loop, "time", fake)
    monkeypatch.setattr(drafter_data.Batches, "__getitem__", slow)
    monkeypatch.setattr(Trainer, "step", noted)
    return rates


@pytest.mark.slow
def test_time_begins_the_decay(clock, tiny_target, tmp_path):
    def settings(name, **more):
        return config(
            "medusa",
            tmp_path / name,
            optimizer={"steps": 50},
            run={"max_minutes": 4.0, **more},
        )

    result = run(settings("whole"), tiny_target)
    assert result.finished and result.step == 7
    rates = list(clock)
    assert rates[1:5] == [rates[1]] * 4
    assert rates[4] > rates[5] > rates[6] > 0.0
    # Stopped in the decay, it goes on with that decay.
    first = run(settings("cut", stop_after=6), tiny_target)
    assert not first.finished
    again = run(settings("cut"), tiny_target)
    assert again.finished and again.step == 7
    assert clock[7:] == rates
    assert again.report.after == result.report.after
    # Once finished, it stays so.
    assert run(settings("whole"), tiny_target).step == 7
    assert len(clock) == 14


@pytest.mark.slow
def test_time_ends_a_run_without_a_decay(clock, tiny_target, tmp_path):
    settings = config(
        "medusa", tmp_path, optimizer={"decay": 0}, run={"max_minutes": 3.0}
    )
    assert run(settings, tiny_target) == drafter_loop.DrafterResult(False, 3)


@pytest.mark.slow
def test_refuses_to_mix_runs(whole, tiny_target):
    folder, *_ = whole
    with pytest.raises(UserError, match=r"with optimizer\.peak=0\.02, not 0\.5"):
        run(config("eagle3", folder, optimizer={"peak": 0.5}), tiny_target)
    with pytest.raises(UserError, match="with method='eagle3', not 'eagle'"):
        run(config("eagle", folder), tiny_target)


def test_mistakes_are_one_line(tiny_target, tmp_path):
    def fails(words, method="eagle3", **parts):
        with pytest.raises(UserError, match=words) as caught:
            run(config(method, tmp_path / "new", **parts), tiny_target)
        assert "\n" not in str(caught.value)

    fails("method 'eagel' is unknown; choose from eagle, eagle3", method="eagel")
    fails("drafter.vocab=98 exceeds the target's 97", drafter={"vocab": 98})
    fails(
        "drafter.vocab=41: a draft model has all 97 tokens",
        "draft_model",
        drafter={"vocab": 41},
    )
    fails("batch_rows=400 exceeds the", data={"batch_rows": 400})
    fails("is not a multiple of micro_rows=3", data={"micro_rows": 3})
    fails("row_tokens=512 exceeds the target's 256", data={"row_tokens": 512})
    fails("is outside 0..2, the target's layers", drafter={"feature_layers": (1, 3)})
    fails("heads=3 is not a multiple of", drafter={"num_heads": 3})
    fails("unknown key 'vocabulary' in drafter", drafter={"vocabulary": 3})
    nothing = config("eagle3", tmp_path / "new")
    with pytest.raises(UserError, match="nothing to train on: give --data=FOLDER"):
        drafter_loop.train(nothing, loaded(tiny_target))
    named = dataclasses.replace(nothing.data, text=("tale.txt",))
    settings = dataclasses.replace(nothing, data=named)
    with pytest.raises(UserError, match="tiny has no tokenizer to read texts with"):
        drafter_loop.train(settings, loaded(tiny_target))
    foreign = answers()
    foreign = dataclasses.replace(foreign, tokens=foreign.tokens + 90)
    with pytest.raises(UserError, match="is outside the target's 97"):
        drafter_loop.train(nothing, loaded(tiny_target), foreign)
