"""The state of a run and the one pure step that advances it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from treespec_jax.models.flat import FlatModule
from treespec_jax.training.losses import cross_entropy, kl_divergence, row_logits
from treespec_jax.training.settings import OptimizerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to go on.

    Attributes:
      leaves: the model's parameters, float32, in the order of `FlatModule.leaves`.
      optimizer: of optax.
      step: int32, optimiser steps done; also the data position.
    """

    leaves: tuple[jax.Array, ...]
    optimizer: Any
    step: jax.Array


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a decay to `floor` of it."""
    if config.decay:
        end = config.steps - config.decay
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, config.peak, config.warmup),
                optax.constant_schedule(config.peak),
                optax.linear_schedule(
                    config.peak, config.peak * config.floor, config.decay
                ),
            ],
            [config.warmup, end],
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.peak,
        peak_value=config.peak,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.peak * config.floor,
    )


def make_optimizer(
    config: OptimizerConfig, rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 1711.05101) after clipping the global norm.

    Args:
      config: its settings.
      rate: learning rate; None: the schedule of `config`.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config) if rate is None else rate,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            # Norm scales are not decayed.
            mask=lambda leaves: jax.tree.map(lambda leaf: leaf.ndim > 1, leaves),
        ),
    )


def make_step(
    student: FlatModule,
    optimizer: optax.GradientTransformation,
    teacher: FlatModule | None = None,
    distill_weight: float = 0.0,
) -> Callable:
    """Returns a jitted `step(state, teacher_leaves, rows) -> (state, loss)`.

    `rows` is int32 [A, M, T + 1]: gradients are the mean over A passes of M rows. The
    state is donated. The loss is that before the update.
    """

    def loss_fn(leaves, teacher_leaves, rows_MT):
        tokens, targets = rows_MT[:, :-1], rows_MT[:, 1:].reshape(-1)
        logits_RV = row_logits(student.bind(leaves), tokens)
        loss = cross_entropy(logits_RV, targets)
        if teacher is None:
            return loss
        wanted_RV = row_logits(teacher.bind(teacher_leaves), tokens)
        divergence = kl_divergence(wanted_RV, logits_RV)
        return (1 - distill_weight) * loss + distill_weight * divergence

    def step(state: TrainState, teacher_leaves, rows_AMT):
        def accumulate(carry, rows_MT):
            loss_and_grads = jax.value_and_grad(loss_fn)(
                state.leaves, teacher_leaves, rows_MT
            )
            return jax.tree.map(jnp.add, carry, loss_and_grads), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.leaves)
        sums, _ = jax.lax.scan(accumulate, zero, rows_AMT)
        loss, grads = jax.tree.map(lambda total: total / len(rows_AMT), sums)
        updates, inner = optimizer.update(grads, state.optimizer, state.leaves)
        leaves = optax.apply_updates(state.leaves, updates)
        return TrainState(leaves, inner, state.step + 1), loss

    return jax.jit(step, donate_argnums=0)
