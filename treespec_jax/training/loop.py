"""A whole training run: text in, checkpoints and an exported model out."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from treespec_jax import checkpoints
from treespec_jax.errors import UserError
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.training import curve, data, measure, resuming, vocabulary
from treespec_jax.training.settings import TrainConfig
from treespec_jax.training.state import (
    TrainState,
    learning_rate,
    make_optimizer,
    make_step,
)
from treespec_jax.training.store import Store


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      finished: the schedule is complete; otherwise the same command goes on.
      step: steps done.
      held_out: best held-out loss, nats per token.
      best_step: where it was reached; these parameters are exported.
      model_path: the exported model, if finished.
      agreement: with the teacher, if there is one and the run is finished.
      sample: the sample prompt and its continuation, if finished.
    """

    finished: bool
    step: int
    held_out: float | None = None
    best_step: int | None = None
    model_path: pathlib.Path | None = None
    agreement: measure.Agreement | None = None
    sample: str = ""


def train(config: TrainConfig) -> Result:
    """Trains, or goes on with, the run that `config` describes.

    A run that is stopped in any way and started again with the same settings ends in
    the same bits as one that was not.

    Raises:
      UserError: text, vocabulary, teacher or output folder cannot be used, or the
        output folder belongs to a run with other settings.
    """
    run = config.run
    folder = pathlib.Path(run.output)
    newest, best = Store(folder / "newest"), Store(folder / "best")
    tokenizer = _tokenizer(config, folder)
    model_config = dataclasses.replace(
        config.model,
        vocab_size=tokenizer.get_piece_size(),
        bos_id=tokenizer.bos_id(),
        eos_ids=(tokenizer.eos_id(),),
    )
    config = dataclasses.replace(config, model=model_config)
    documents = [data.read_documents(source) for source in config.data.sources]
    rows = data.load_rows(config.data, documents, tokenizer.encode)
    teacher = _teacher(config)

    model = Transformer(config.model, rngs=nnx.Rngs(config.seed))
    flat = FlatModule(model)
    optimizer = make_optimizer(config.optimizer)
    start = jnp.zeros((), jnp.int32)
    state = TrainState(flat.leaves, optimizer.init(flat.leaves), start)
    identity = config.identity() | {"text": rows.fingerprint}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    notes = newest.notes() or {"identity": identity, "curve": []}
    resuming.check_same(notes["identity"], identity, folder)
    if newest.notes():
        state = newest.restore(state)
    step = make_step(flat, optimizer, teacher, config.distill.weight)
    parts = _Parts(flat, teacher, rows, newest, best, notes)
    state = _advance(config, state, step, parts)

    done = int(state.step)
    if done < config.optimizer.steps:
        return Result(False, done)
    best_notes = best.notes()
    leaves = best.restore(flat.leaves)
    final = FlatModule(flat.bind(leaves))
    half = config.data.row_tokens // 2
    prompt = [vocabulary.BOS, *tokenizer.encode(run.sample)][:half]
    sample = prompt + measure.continue_greedily(final, prompt, half, vocabulary.EOS)
    micro_rows = config.data.micro_rows
    exported = checkpoints.LoadedModel(
        config.model,
        flat.bind(leaves),
        checkpoints.load_tokenizer(folder / vocabulary.FILE_NAME),
        # Not the path: a checkpoint travels.
        source=folder.name,
        dtype=jnp.dtype("float32"),
    )
    path = folder / "model"
    checkpoints.save(exported, path, dtype=run.export_dtype)
    agreement = None
    if teacher is not None:
        agreement = measure.agreement(teacher, final, rows.held_out, micro_rows)
    return Result(
        True,
        done,
        best_notes["held_out"],
        best_notes["step"],
        path,
        agreement,
        tokenizer.decode(sample),
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run reads and writes; `notes` lie beside the newest state."""

    flat: FlatModule
    teacher: FlatModule | None
    rows: data.Rows
    newest: Store
    best: Store
    notes: dict[str, Any]


def _advance(config, state: TrainState, step_fn, parts: _Parts) -> TrainState:
    """Runs steps until the schedule, the step limit or a signal ends them."""
    run, cfg, rows, best = config.run, config.data, parts.rows, parts.best
    folder = pathlib.Path(run.output)
    held_out_loss = measure.make_held_out_loss(parts.flat)
    # Spread over all sources and documents, in a fixed choice.
    spread = np.linspace(0, len(rows.held_out) - 1, run.eval_rows)
    held_rows = rows.held_out[np.unique(spread.astype(int))]
    batches = data.Batches(rows, cfg.batch_rows, cfg.seed)
    teacher_leaves = parts.teacher.leaves if parts.teacher is not None else ()
    rate = learning_rate(config.optimizer)
    table: list[list] = parts.notes["curve"]
    start, total = int(state.step), config.optimizer.steps
    last = min(total, start + run.stop_after) if run.stop_after else total

    def save(step: int) -> None:
        parts.newest.save(step, state, parts.notes)
        curve.write_csv(folder / "loss.csv", table)

    bar = tqdm.tqdm(
        total=total, initial=start, unit="step", disable=not run.progress, mininterval=2
    )
    saved_at, saved_step = time.monotonic(), start
    with bar, resuming.interruption() as interruption:
        for step in range(start + 1, last + 1):
            rows_BT = batches[step - 1]
            shape = (-1, cfg.micro_rows, rows_BT.shape[1])
            state, loss = step_fn(state, teacher_leaves, rows_BT.reshape(shape))
            table.append([step, float(loss), None])
            if not np.isfinite(table[-1][1]):
                raise UserError(
                    f"the loss is not finite at step {step}; lower optimizer.peak="
                    f"{config.optimizer.peak:g}"
                )
            if step % run.eval_every == 0 or step == total:
                held = held_out_loss(state.leaves, held_rows, cfg.micro_rows)
                table[-1][2] = held
                known = best.notes()
                if known is None or held < known["held_out"]:
                    best.save(step, state.leaves, {"step": step, "held_out": held})
                curve.write_csv(folder / "loss.csv", table)
            bar.update()
            bar.set_postfix(
                loss=f"{table[-1][1]:.3f}",
                held_out=_last_held_out(table),
                rate=f"{float(rate(step)):.1e}",
                refresh=False,
            )
            if time.monotonic() - saved_at >= run.save_minutes * 60:
                save(step)
                saved_at, saved_step = time.monotonic(), step
            if interruption.is_set():
                break
    if int(state.step) > saved_step:
        save(int(state.step))
    if table:
        curve.write_png(folder / "loss.png", table)
    return state


def _last_held_out(table: list[list]) -> str:
    return next((f"{r[2]:.3f}" for r in reversed(table) if r[2] is not None), "-")


def _tokenizer(config: TrainConfig, folder: pathlib.Path):
    """The vocabulary of the run: its own if it has begun, the given one, or a new one.

    It lies in the run's folder from then on.
    """
    file, wanted = folder / vocabulary.FILE_NAME, config.vocabulary
    given = None
    if wanted.path:
        given = vocabulary.load(wanted.path).serialized_model_proto()
    if file.exists():
        if given is not None and given != file.read_bytes():
            raise UserError(
                f"{folder} holds a run with another vocabulary than {wanted.path}; "
                "choose another --output"
            )
        return vocabulary.load(file)
    if given is None:
        documents = [data.read_documents(s) for s in config.data.sources]
        given = vocabulary.train((d for ds in documents for d in ds), wanted.size)
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(given)
    os.replace(partial, file)
    return vocabulary.load(file)


def _teacher(config: TrainConfig) -> FlatModule | None:
    path = config.distill.teacher
    if not path:
        return None
    teacher = checkpoints.load(path, dtype=jnp.float32)
    size, wanted = teacher.config.vocab_size, config.model.vocab_size
    if size != wanted:
        raise UserError(
            f"the teacher {path} has {size} tokens, not the vocabulary's {wanted}; "
            f"give --vocabulary={path}"
        )
    return FlatModule(teacher.model)
