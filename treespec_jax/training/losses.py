"""Next-token cross entropy and distillation, in float32 nats per token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.models.transformer import Transformer


def row_logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    """Logits [B·T, V] of packed rows: each row is one causal chain from position 0."""
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    causal_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    hidden_DR = model(tokens_BT, positions_BT, causal_BTT).hidden
    return model.logits(hidden_DR)


def cross_entropy(logits_RV: jax.Array, targets_R: jax.Array) -> jax.Array:
    """Mean of -log p(target)."""
    chosen_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits_RV, axis=-1) - chosen_R)


def kl_divergence(teacher_RV: jax.Array, student_RV: jax.Array) -> jax.Array:
    """Mean of KL(teacher ‖ student), both given as logits."""
    teacher = jax.nn.log_softmax(teacher_RV)
    student = jax.nn.log_softmax(student_RV)
    return jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))
