"""Held-out loss, agreement of two models, and a sample of text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.models.flat import FlatModule
from treespec_jax.training.losses import cross_entropy, kl_divergence, row_logits


def make_held_out_loss(model: FlatModule):
    """Returns `f(leaves, rows [n, T + 1], micro_rows) -> float`, nats per token."""

    @jax.jit
    def mean_loss(leaves, rows):
        logits = row_logits(model.bind(leaves), rows[:, :-1])
        return cross_entropy(logits, rows[:, 1:].reshape(-1))

    def held_out_loss(leaves, rows: np.ndarray, micro_rows: int) -> float:
        passes = _passes(rows, micro_rows)
        return float(np.mean([mean_loss(leaves, part) for part in passes]))

    return held_out_loss


def _passes(rows: np.ndarray, micro_rows: int) -> np.ndarray:
    """[passes, M, T + 1]; whole passes only, so that one compilation serves all."""
    micro_rows = min(micro_rows, len(rows))
    whole = len(rows) - len(rows) % micro_rows
    return rows[:whole].reshape(-1, micro_rows, rows.shape[1])


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well a drafter foresees its target on given text.

    Attributes:
      top1: share of positions at which both have the same likeliest token.
      top4: share at which the target's likeliest is among the drafter's four.
      kl: mean KL(target ‖ drafter), nats.
      positions: number measured.
    """

    top1: float
    top4: float
    kl: float
    positions: int


def agreement(
    target: FlatModule, drafter: FlatModule, rows: np.ndarray, micro_rows: int
) -> Agreement:
    """Measures `Agreement` on packed rows [n, T + 1]."""

    @jax.jit
    def measure(target_leaves, drafter_leaves, tokens):
        target_RV = row_logits(target.bind(target_leaves), tokens)
        drafter_RV = row_logits(drafter.bind(drafter_leaves), tokens)
        best_R = jnp.argmax(target_RV, axis=-1)
        _, four_R4 = jax.lax.top_k(drafter_RV, 4)
        hit_R4 = four_R4 == best_R[:, None]
        kl = kl_divergence(target_RV, drafter_RV)
        return jnp.mean(hit_R4[:, 0]), jnp.mean(jnp.any(hit_R4, axis=-1)), kl

    passes = _passes(rows, micro_rows)[..., :-1]
    parts = [measure(target.leaves, drafter.leaves, tokens) for tokens in passes]
    means = np.mean(np.array(parts), axis=0).tolist()
    return Agreement(*means, positions=passes.size)


def continue_greedily(model: FlatModule, prompt: list[int], count: int, eos: int):
    """`count` greedy tokens after `prompt`, fewer at the end of a text.

    For a look at a model in training; it recomputes everything for every token.
    """
    total = len(prompt) + count

    @jax.jit
    def next_token(leaves, tokens_1T, row):
        logits_RV = row_logits(model.bind(leaves), tokens_1T)
        return jnp.argmax(logits_RV[row])

    tokens = np.zeros((1, total), np.int32)
    tokens[0, : len(prompt)] = prompt
    for index in range(len(prompt), total):
        tokens[0, index] = next_token(model.leaves, tokens, index - 1)
        if tokens[0, index] == eos:
            break
    return tokens[0, len(prompt) : index + 1].tolist()
