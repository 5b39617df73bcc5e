"""A drafter's whole training run: answers in, checkpoints and a drafter out."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

from treespec_jax import checkpoints
from treespec_jax.errors import UserError
from treespec_jax.models.flat import FlatModule
from treespec_jax.training import curve, drafter_data, head_losses
from treespec_jax.training.answers import MaskedRows
from treespec_jax.training.drafter_settings import DrafterTraining
from treespec_jax.training.head_losses import Split, Taught
from treespec_jax.training.make_head import make_head
from treespec_jax.training.resuming import check_same, interruption
from treespec_jax.training.state import TrainState, learning_rate, make_optimizer
from treespec_jax.training.store import Store

# Shapes whose tokens per step are told while a run goes on: children by depth.
SHAPES = {
    "chain:3": (1, 1, 1),
    "chain:5": (1, 1, 1, 1, 1),
    "regular:3x2x1": (3, 2, 1),
    "regular:4x2x2x1x1": (4, 2, 2, 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of held-out text.

    Attributes:
      loss: the objective, nats per prediction.
      tokens_per_step: by shape; of decoding that meets every position alike, where the
        text is the target's own.
    """

    loss: float
    tokens_per_step: dict[str, float]


@dataclasses.dataclass(frozen=True)
class DrafterResult:
    """What a run came to.

    Attributes:
      finished: the schedule is complete; otherwise the same command goes on.
      step: steps done.
      best: of the exported parameters.
      best_step: where they were reached.
      path: of the exported drafter, if finished.
      cost: see `cost_of`.
    """

    finished: bool
    step: int
    best: Measured | None = None
    best_step: int | None = None
    path: pathlib.Path | None = None
    cost: dict[str, float] | None = None


class Trainer:
    """The jitted functions of a run, over one target and one drafter.

    Args:
      config: of the run.
      target: loaded, its weights in the dtype of the computation.
      rows: to train on; the drafter's tokens are chosen from them.
    """

    def __init__(
        self, config: DrafterTraining, target: checkpoints.LoadedModel, rows: MaskedRows
    ):
        self.config = config
        self.head = make_head(config, target.model, rows)
        self.split = Split.of(self.head)
        self._target = FlatModule(target.model)
        # The rate is an argument: a schedule that is cut short compiles nothing.
        self._optimizer = make_optimizer(config.optimizer, 1.0)
        self._dtype = target.dtype
        devices = np.asarray(jax.devices())
        self._mesh = None
        if len(devices) > 1 and config.data.micro_rows % len(devices) == 0:
            self._mesh = jax.sharding.Mesh(devices, ("data",))
        self._fixed = self._everywhere(self.split.leaves(trained=False))
        self._target_leaves = self._everywhere(self._target.leaves)
        self._step = jax.jit(self._advance, donate_argnums=0)
        self._measure = jax.jit(self._measured)

    def init(self) -> TrainState:
        """Before the first step."""
        leaves = tuple(
            leaf.astype(jnp.float32) for leaf in self.split.leaves(trained=True)
        )
        start = jnp.zeros((), jnp.int32)
        state = TrainState(leaves, self._optimizer.init(leaves), start)
        return self._everywhere(state)

    def step(
        self, state: TrainState, rows: MaskedRows, rate: float
    ) -> tuple[TrainState, jax.Array]:
        """One optimiser step over rows [batch_rows, T + 1]; the loss before it."""
        shape = -1, self.config.data.micro_rows, rows.tokens.shape[1]
        batch = rows.tokens.reshape(shape), rows.written.reshape(shape)
        batch = self._cut(batch)
        rate = np.float32(rate)
        return self._step(state, self._fixed, self._target_leaves, rate, *batch)

    def measure(self, leaves, rows: MaskedRows) -> Measured:
        """Of whole runs of micro_rows rows."""
        width = min(self.config.data.micro_rows, len(rows.tokens))
        sums = collections.Counter()
        for first in range(0, len(rows.tokens) - width + 1, width):
            part = slice(first, first + width)
            found = self._measure(
                leaves,
                self._fixed,
                self._target_leaves,
                rows.tokens[part],
                rows.written[part],
            )
            sums.update({name: float(value) for name, value in found.items()})
        per_step = {
            name: 1 + sums[name] / max(sums["positions"], 1)
            for name in SHAPES
            if name in sums
        }
        return Measured(sums["loss"] / sums["runs"], per_step)

    def trained(self, leaves) -> nnx.Module:
        """The drafter with these trained leaves."""
        return self.split.bind(leaves, self.split.leaves(trained=False))

    def flops_per_token(self) -> float:
        """Of a training step, as a rule of thumb: 2 a parameter of the target, 6 a
        parameter that a prediction reads."""
        target = sum(leaf.size for leaf in self._target.leaves)
        layers = sum(leaf.size for leaf in self.split.leaves(trained=True))
        config = self.config.objective
        head = self.head.head[...].size if self.head.config.shared_head else 0
        return 2.0 * target + 6.0 * (layers + head) * config.predictions

    def _advance(self, state, fixed, target_leaves, rate, tokens_AMU, counts_AMU):
        objective = self.config.objective

        def loss_of(leaves, taught):
            drafter = self._bound(leaves, fixed)
            return head_losses.loss(drafter, taught, objective)

        def accumulate(carry, part):
            taught = self._taught(fixed, target_leaves, state.leaves, *part)
            found = jax.value_and_grad(loss_of)(state.leaves, taught)
            return jax.tree.map(jnp.add, carry, found), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.leaves)
        sums, _ = jax.lax.scan(accumulate, zero, (tokens_AMU, counts_AMU))
        loss, grads = jax.tree.map(lambda total: total / len(tokens_AMU), sums)
        updates, inner = self._optimizer.update(grads, state.optimizer, state.leaves)
        updates = jax.tree.map(lambda update: rate * update, updates)
        leaves = optax.apply_updates(state.leaves, updates)
        return TrainState(leaves, inner, state.step + 1), loss

    def _measured(self, leaves, fixed, target_leaves, tokens_BU, counts_BU):
        taught = self._taught(fixed, target_leaves, leaves, tokens_BU, counts_BU)
        drafter, objective = self._bound(leaves, fixed), self.config.objective
        count = objective.predictions
        rank_SBT, valid_SBT = head_losses.ranks(drafter, taught, count)
        out = {"loss": head_losses.loss(drafter, taught, objective), "runs": 1.0}
        valid_BT = valid_SBT[-1]
        out["positions"] = jnp.sum(valid_BT)
        for name, widths in SHAPES.items():
            if len(widths) > count:
                continue
            limit = jnp.asarray(widths)[:, None, None]
            right_SBT = jnp.cumprod(rank_SBT[: len(widths)] < limit, axis=0)
            out[name] = jnp.sum(jnp.sum(right_SBT, axis=0) * valid_BT)
        return out

    def _taught(self, fixed, target_leaves, leaves, tokens, counts) -> Taught:
        target = self._target.bind(target_leaves)
        drafter = self._bound(leaves, fixed)
        return jax.lax.stop_gradient(head_losses.teach(target, drafter, tokens, counts))

    def _bound(self, leaves, fixed):
        leaves = tuple(leaf.astype(self._dtype) for leaf in leaves)
        return self.split.bind(leaves, fixed)

    def _everywhere(self, tree):
        if self._mesh is None:
            return tree
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.device_put(tree, whole)

    def _cut(self, batch):
        if self._mesh is None:
            return batch
        spec = jax.sharding.PartitionSpec(None, "data")
        return jax.device_put(batch, jax.sharding.NamedSharding(self._mesh, spec))


def train(
    config: DrafterTraining,
    export: Callable[[Trainer, tuple, pathlib.Path], None] | None = None,
) -> DrafterResult:
    """Trains, or goes on with, the run that `config` describes.

    A run that is stopped in any way and started again with the same settings ends in
    the same bits as one that was not.

    Args:
      config: of the run.
      export: writes the drafter; None: as `checkpoints.drafters` does.

    Raises:
      UserError: target, answers or output folder cannot be used, or the output folder
        belongs to a run with other settings.
    """
    run = config.run
    folder = pathlib.Path(run.output)
    newest, best = Store(folder / "newest"), Store(folder / "best")
    dtype = run.dtype
    if not dtype:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    target = checkpoints.load(config.target, dtype=dtype)
    rows, held_out = drafter_data.load(config.data, target)
    trainer = Trainer(config, target, rows)
    identity = config.identity() | {"text": drafter_data.fingerprint(rows)}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    notes = newest.notes() or {
        "identity": identity,
        "curve": [],
        "seconds": 0.0,
        "tokens": 0,
    }
    check_same(notes["identity"], identity, folder)
    state = trainer.init()
    if newest.notes():
        state = newest.restore(state)
    state = _advance(trainer, state, rows, held_out, (newest, best, notes))
    done = int(state.step)
    cost = cost_of(trainer, target, notes)
    if done < notes.get("steps", config.optimizer.steps):
        return DrafterResult(False, done, cost=cost)
    leaves, kept = best.restore(state.leaves), best.notes()
    path = folder / "drafter"
    if export is None:
        from treespec_jax.checkpoints import drafters

        export = drafters.export
    export(trainer, leaves, path)
    return DrafterResult(
        True,
        done,
        Measured(kept["held_out"], kept["tokens_per_step"]),
        kept["step"],
        path,
        cost,
    )


def cost_of(trainer: Trainer, target, notes) -> dict[str, float]:
    """What a run cost so far.

    Returns:
      parameters trained, their share of the target's, tokens seen, floating-point
      operations (a rule of thumb, `Trainer.flops_per_token`), seconds.
    """
    mine = sum(leaf.size for leaf in trainer.split.leaves(trained=True))
    whole = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(target.model)))
    tokens = notes["tokens"]
    return {
        "parameters": mine,
        "share": mine / whole,
        "tokens": tokens,
        "flops": tokens * trainer.flops_per_token(),
        "seconds": notes["seconds"],
    }


def _advance(trainer: Trainer, state, rows, held_out, stores):
    """Runs steps until the schedule, a limit or a signal ends them."""
    newest, best, notes = stores
    config = trainer.config
    run, folder = config.run, pathlib.Path(config.run.output)
    spread = np.linspace(0, len(held_out.tokens) - 1, run.eval_rows)
    held_out = drafter_data.take(held_out, np.unique(spread.astype(int)))
    batches = drafter_data.Batches(rows, config.data.batch_rows, config.data.seed)
    schedule = config.optimizer
    table: list[list] = notes["curve"]
    start, total = int(state.step), schedule.steps
    last = min(total, start + run.stop_after) if run.stop_after else total
    began = saved_at = counted_at = time.monotonic()
    rate = learning_rate(schedule)
    saved_step, shown = start, {}

    def save(step: int) -> None:
        newest.save(step, state, notes)
        curve.write_csv(folder / "loss.csv", [row[:3] for row in table])

    def measure(step: int) -> None:
        found = trainer.measure(state.leaves, held_out)
        table[-1][2:] = [found.loss, found.tokens_per_step]
        shown.update({n: f"{v:.2f}" for n, v in found.tokens_per_step.items()})
        known = best.notes()
        if known is None or found.loss < known["held_out"]:
            about = {"held_out": found.loss, "tokens_per_step": found.tokens_per_step}
            best.save(step, state.leaves, {"step": step, **about})

    bar = tqdm.tqdm(
        total=total, initial=start, unit="step", disable=not run.progress, mininterval=2
    )
    pending: list[tuple[int, Any]] = []

    def read_losses() -> None:
        for row, value in pending:
            table[row][1] = float(value)
            if not np.isfinite(table[row][1]):
                raise UserError(
                    f"the loss is not finite at step {table[row][0]}; lower "
                    f"optimizer.peak={config.optimizer.peak:g}"
                )
        pending.clear()

    with bar, interruption() as interrupted:
        for step in range(start + 1, last + 1):
            batch = batches[step - 1]
            state, loss = trainer.step(state, batch, rate(step - 1))
            table.append([step, None, None, None])
            pending.append((len(table) - 1, loss))
            notes["tokens"] += batch.tokens[:, 1:].size
            now = time.monotonic()
            is_due = now - saved_at >= run.save_minutes * 60
            over = run.max_minutes and now - began >= run.max_minutes * 60
            can_decay = schedule.warmup < step < total - schedule.decay
            if over and schedule.decay and can_decay:
                # Time is up for all but the decay.
                over, total = False, step + schedule.decay
                last = min(last, total)
                schedule = dataclasses.replace(schedule, steps=total)
                rate = learning_rate(schedule)
                bar.total = notes["steps"] = total
            ends = interrupted.is_set() or step == last or (over and not schedule.decay)
            if step % run.eval_every == 0 or step == total or len(pending) >= 20:
                read_losses()
            if step % run.eval_every == 0 or step == total:
                measure(step)
            notes["seconds"] += time.monotonic() - counted_at
            counted_at = time.monotonic()
            bar.update()
            losses = [row[1] for row in table[-40:] if row[1] is not None]
            if losses:
                bar.set_postfix(
                    loss=f"{losses[-1]:.3f}",
                    rate=f"{float(rate(step)):.1e}",
                    **shown,
                    refresh=False,
                )
            if is_due or ends:
                read_losses()
                save(step)
                saved_at, saved_step = time.monotonic(), step
            if ends:
                break
    if int(state.step) > saved_step:
        save(int(state.step))
    if table:
        curve.write_png(folder / "loss.png", [row[:3] for row in table])
    return state
