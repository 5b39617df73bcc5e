"""A drafter's whole training run: answers in, checkpoints and a drafter out."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

from treespec_jax import checkpoints
from treespec_jax.errors import UserError
from treespec_jax.training import curve, drafter_data
from treespec_jax.training.answers import Answers, MaskedRows
from treespec_jax.training.drafter_report import Cost, Report
from treespec_jax.training.drafter_settings import DrafterTraining
from treespec_jax.training.drafter_trainer import SHAPES, Measured, Trainer
from treespec_jax.training.resuming import check_same, interruption
from treespec_jax.training.state import TrainState, learning_rate
from treespec_jax.training.store import Store

# Losses that wait on the device before they are looked at.
_PENDING = 20


@dataclasses.dataclass(frozen=True)
class DrafterResult:
    """What a run came to.

    Attributes:
      finished: the schedule is complete; otherwise the same command goes on.
      step: steps done.
      report: if finished.
      path: of the exported drafter, if finished.
    """

    finished: bool
    step: int
    report: Report | None = None
    path: pathlib.Path | None = None


def train(
    config: DrafterTraining,
    target: checkpoints.LoadedModel | None = None,
    answers: Answers | None = None,
) -> DrafterResult:
    """Trains, or goes on with, the run that `config` describes.

    A run that is stopped in any way and started again with the same settings ends in
    the same bits as one that was not, unless time ends it.

    Args:
      config: of the run.
      target: None: what `config.target` names; its dtype is that of the computation.
      answers: None: what `config.data` names.

    Raises:
      UserError: target, answers or output folder cannot be used, or the output folder
        belongs to a run with other settings.
    """
    folder = pathlib.Path(config.run.output).expanduser()
    if answers is None:
        config.data.check_named()
    newest, best = Store(folder / "newest"), Store(folder / "best")
    if target is None:
        dtype = config.run.dtype
        if not dtype:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        target = checkpoints.load(config.target, dtype=dtype)
    rows, held_out = drafter_data.load(config.data, target, answers)
    trainer = Trainer(config, target, rows)
    identity = config.identity() | {"text": drafter_data.fingerprint(rows)}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    notes = newest.notes()
    state = trainer.init()
    if notes is None:
        notes = {"identity": identity, "curve": [], "seconds": 0.0, "tokens": 0}
    else:
        check_same(notes["identity"], identity, folder)
        state = newest.restore(state)
    run = _Run(trainer, state, (rows, held_out), (newest, best), notes)
    state = run.carry_out()
    done = int(state.step)
    if done < run.schedule.steps:
        return DrafterResult(False, done)
    path, chosen = folder / "drafter", best.notes()
    drafter = trainer.trained(best.restore(state.leaves))
    trainer.student.save(drafter, target, path, config.run.export_dtype)
    report = Report(
        config.method,
        config.target,
        cost_of(trainer, done, notes),
        Measured(**notes["before"]),
        Measured(chosen["loss"], chosen["tokens_per_step"]),
        chosen["step"],
    )
    report.write(folder / "cost.json")
    return DrafterResult(True, done, report, path)


def cost_of(trainer: Trainer, steps: int, notes: dict[str, Any]) -> Cost:
    """What a run cost after so many steps, by its notes."""
    return Cost(
        trainer.parameters,
        trainer.parameters / trainer.target_parameters,
        steps,
        notes["tokens"],
        notes["tokens"] * trainer.flops_per_token,
        notes["seconds"],
    )


class _Run:
    """One process's part of a run.

    Args:
      trainer: of the run.
      state: to go on from.
      rows: to train on, and held out.
      stores: of the newest state, and of the best trained leaves.
      notes: lie beside the newest state: `identity`, `curve` (step, loss, held-out
        loss, tokens per step), `seconds`, `tokens`, `before` (the untrained drafter's
        `Measured`), and `steps` of the schedule once time has cut it short.
    """

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        rows: tuple[MaskedRows, MaskedRows],
        stores: tuple[Store, Store],
        notes: dict[str, Any],
    ):
        config = trainer.config
        self._trainer, self._state, self._notes = trainer, state, notes
        self._newest, self._best = stores
        self._settings, self._folder = config.run, self._newest.folder.parent
        train_rows, held_out = rows
        spread = np.linspace(0, len(held_out.tokens) - 1, config.run.eval_rows)
        self._held_out = drafter_data.take(held_out, np.unique(spread.astype(int)))
        self._batches = drafter_data.Batches(
            train_rows, config.data.batch_rows, config.data.seed
        )
        self._batch_tokens = config.data.batch_rows * config.data.row_tokens
        self._use(notes.get("steps", config.optimizer.steps))
        # Losses on the device, by their row of the curve.
        self._pending: dict[int, jax.Array] = {}

    def carry_out(self) -> TrainState:
        """Runs steps until the schedule, a limit or a signal ends them."""
        settings, step = self._settings, int(self._state.step)
        last = step + settings.stop_after if settings.stop_after else math.inf
        self._began = self._saved_at = self._counted_at = time.monotonic()
        bar = tqdm.tqdm(
            total=self.schedule.steps,
            initial=step,
            unit="step",
            disable=not settings.progress,
            mininterval=2,
        )
        if "before" not in self._notes:
            untrained = self._trainer.measure(self._state.leaves, self._held_out)
            self._notes["before"] = dataclasses.asdict(untrained)
        ends = step >= self.schedule.steps
        with bar, interruption() as interrupted:
            while not ends:
                step += 1
                self._step(step)
                ends = self._out_of_time(step) or interrupted.is_set() or step >= last
                ends = ends or step == self.schedule.steps
                is_eval = step % settings.eval_every == 0 or step == self.schedule.steps
                if is_eval or len(self._pending) >= _PENDING or ends:
                    self._read_losses()
                if is_eval:
                    self._measure(step)
                self._count_time()
                self._show(bar, step)
                if ends or self._is_due():
                    self._save(step)
        if self._notes["curve"]:
            curve.write_drafter_png(
                self._folder / "loss.png", self._notes["curve"], self._batch_tokens
            )
        return self._state

    def _use(self, steps: int) -> None:
        """Follows a schedule of so many steps."""
        optimizer = self._trainer.config.optimizer
        self.schedule = dataclasses.replace(optimizer, steps=steps)
        self._rate = learning_rate(self.schedule)

    def _step(self, step: int) -> None:
        rate = self._rate(step - 1)
        batch = self._batches[step - 1]
        self._state, loss = self._trainer.step(self._state, batch, rate)
        self._pending[len(self._notes["curve"])] = loss
        self._notes["curve"].append([step, None, None, None])
        self._notes["tokens"] += self._batch_tokens

    def _out_of_time(self, step: int) -> bool:
        """Whether the process ends by the clock; if it can, the decay begins first."""
        minutes = self._settings.max_minutes
        if not minutes or time.monotonic() - self._began < 60 * minutes:
            return False
        schedule = self.schedule
        if not schedule.decay:
            return True
        if schedule.warmup < step < schedule.steps - schedule.decay:
            self._notes["steps"] = step + schedule.decay
            self._use(self._notes["steps"])
        return False

    def _read_losses(self) -> None:
        table = self._notes["curve"]
        for row, value in self._pending.items():
            table[row][1] = float(value)
            if not math.isfinite(table[row][1]):
                raise UserError(
                    f"the loss is not finite at step {table[row][0]}; lower "
                    f"optimizer.peak={self.schedule.peak:g}"
                )
        self._pending.clear()

    def _measure(self, step: int) -> None:
        found = self._trainer.measure(self._state.leaves, self._held_out)
        self._notes["curve"][-1][2:] = [found.loss, found.tokens_per_step]
        known = self._best.notes()
        if known is None or found.loss < known["loss"]:
            about = {"step": step, **dataclasses.asdict(found)}
            self._best.save(step, self._state.leaves, about)

    def _count_time(self) -> None:
        now = time.monotonic()
        self._notes["seconds"] += now - self._counted_at
        self._counted_at = now

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._settings.save_minutes * 60

    def _save(self, step: int) -> None:
        self._read_losses()
        self._newest.save(step, self._state, self._notes)
        curve.write_drafter_csv(
            self._folder / "loss.csv",
            self._notes["curve"],
            self._batch_tokens,
            tuple(SHAPES),
        )
        self._saved_at = time.monotonic()

    def _show(self, bar: tqdm.tqdm, step: int) -> None:
        bar.total = self.schedule.steps
        bar.update()
        table = self._notes["curve"][-2 * self._settings.eval_every :]
        shown = {}
        for _, loss, _, per_step in table:
            if loss is not None:
                shown["loss"] = f"{loss:.3f}"
            for name, value in (per_step or {}).items():
                shown[name] = f"{value:.2f}"
        rate = f"{float(self._rate(step)):.1e}"
        bar.set_postfix(rate=rate, **shown, refresh=False)
