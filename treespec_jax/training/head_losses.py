"""What drafters are trained on, and how good they are at it.

Row i of a text holds token i and the target's features of it. Prediction s of that row
is of token i + first + s (`Student.first`: 2 for drafters over the target's rows, 1 for
a draft model), which the target decides at the row before that token. An EAGLE layer
makes prediction s from its own outputs of the predictions before (training-time test,
2503.01840); Medusa's head s makes it from row i directly; a draft model reads the text
up to the token, so that prediction 0 of all rows says everything. The loss of
prediction s is the cross entropy with the target's own distribution, over the tokens
that the drafter knows,

  -Σ_v p(v | tokens to i + first + s - 1) · log q_s(v | row i),

weighted by decay^s, of rows whose predicted token the target wrote itself. Tokens that
the drafter does not know take their share of p out of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.transformer import Transformer
from treespec_jax.training.drafter_settings import Objective
from treespec_jax.training.students import Prediction, Student, Taught

# Columns of logits over the whole vocabulary that are in memory at once.
COLUMNS = 4096


def teach(
    student: Student,
    drafter: nnx.Module,
    target: Transformer,
    tokens_BU: jax.Array,
    counts_BU: jax.Array,
) -> Taught:
    """Runs the target over rows of U = T + 1 tokens."""
    tokens_BT = tokens_BU[:, :-1]
    B, T = tokens_BT.shape
    layers, last = student.feature_layers(drafter), target.config.num_layers
    forward = target(
        tokens_BT,
        jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
        feature_layers=tuple(sorted({*layers, last})),
    )
    by_layer = dict(zip(sorted({*layers, last}), forward.features, strict=True))
    ids = student.token_ids(drafter)

    def log_p_of(normed_DJ):
        logits_VJ = target.unembed(normed_DJ)
        total_J = jax.nn.logsumexp(logits_VJ, axis=0)
        return (logits_VJ if ids is None else logits_VJ[ids]) - total_J

    normed_DR = by_layer[last]
    log_p_VR = _by_columns(log_p_of, normed_DR)
    features = tuple(by_layer[layer] for layer in layers)
    return Taught(tokens_BU, counts_BU, features, log_p_VR)


def _by_columns(function: Callable, x_DR: jax.Array) -> jax.Array:
    """`function` of columns, in runs of at most `COLUMNS`."""
    D, R = x_DR.shape
    runs = -(-R // COLUMNS)
    if runs == 1:
        return function(x_DR)
    width = -(-R // runs)
    padded = jnp.pad(x_DR, ((0, 0), (0, runs * width - R)))
    parts = jax.lax.map(function, padded.reshape(D, runs, width).transpose(1, 0, 2))
    return parts.transpose(1, 0, 2).reshape(-1, runs * width)[:, :R]


def loss(
    student: Student, drafter: nnx.Module, taught: Taught, objective: Objective
) -> jax.Array:
    """The objective, nats per prediction."""
    batch, total = taught.tokens.shape[0], 0.0
    made = _predictions(student, drafter, taught, objective.predictions)
    weights = objective.decay ** jnp.arange(len(made))
    weights /= jnp.sum(weights)
    for s, prediction in enumerate(made):
        ahead = student.first + s
        counts_R = _ahead(taught.counts, ahead).reshape(-1)
        number = jnp.maximum(jnp.sum(counts_R), 1)
        log_p_VR = _shifted(taught.log_p, batch, ahead - 1)

        # What a product can make again need not be remembered.
        @jax.checkpoint
        def entropies(hidden_DR, log_p_VR, prediction=prediction):
            log_q_VR = jax.nn.log_softmax(prediction.logits(hidden_DR), axis=0)
            return -jnp.sum(jnp.exp(log_p_VR) * log_q_VR, axis=0)

        entropy_R = entropies(prediction.hidden, log_p_VR)
        part = objective.token_weight * jnp.sum(entropy_R * counts_R) / number
        if objective.feature_weight and prediction.feature is not None:
            wanted_DR = _shifted(taught.features[-1], batch, ahead - 1)
            distance_R = _smooth_l1(prediction.feature, wanted_DR)
            distance = jnp.sum(distance_R * counts_R) / number
            part += objective.feature_weight * distance
        total += weights[s] * part
    return total


def ranks(
    student: Student, drafter: nnx.Module, taught: Taught, count: int
) -> tuple[jax.Array, jax.Array]:
    """At which rank each prediction has the token that the text goes on with.

    Returns:
      int32 [S, B, T], Vd for a token that the drafter does not know; and bool
      [S, B, T], whether there is such a token and it counts.
    """
    found = []
    for s, prediction in enumerate(_predictions(student, drafter, taught, count)):
        wanted_BT = _ahead(taught.tokens, student.first + s)
        column_R, known_R = _columns(student.token_ids(drafter), wanted_BT.reshape(-1))
        logits_VR = prediction.logits(prediction.hidden)
        chosen_R = jnp.take_along_axis(logits_VR, column_R[None], axis=0)
        rank_R = jnp.sum(logits_VR > chosen_R, axis=0, dtype=jnp.int32)
        rank_R = jnp.where(known_R, rank_R, logits_VR.shape[0])
        found.append(rank_R.reshape(wanted_BT.shape))
    if student.chained:
        found = [jnp.pad(found[0][:, s:], ((0, 0), (0, s))) for s in range(count)]
    valid = [_ahead(taught.counts, student.first + s) for s in range(count)]
    return jnp.stack(found), jnp.stack(valid)


def _predictions(student, drafter, taught, count: int) -> list[Prediction]:
    return student.predictions(drafter, taught, 1 if student.chained else count)


def _ahead(x_BU: jax.Array, by: int) -> jax.Array:
    """[B, T], for each row i what token i + by has; zeros past the end."""
    return jnp.pad(x_BU[:, by:], ((0, 0), (0, by - 1)))


def _shifted(x_XR: jax.Array, batch: int, by: int) -> jax.Array:
    """Columns of rows i + by in the place of rows i; the last ones are repeated."""
    x_XBT = x_XR.reshape(x_XR.shape[0], batch, -1)
    moved = x_XBT[:, :, by:]
    last = jnp.repeat(x_XBT[:, :, -1:], by, axis=2)
    return jnp.concatenate([moved, last], axis=2).reshape(x_XR.shape)


def _smooth_l1(x_DR: jax.Array, wanted_DR: jax.Array) -> jax.Array:
    """float32 [R], the mean over D of the smooth L1 distance (2401.15077)."""
    apart = (x_DR - wanted_DR).astype(jnp.float32)
    size = jnp.abs(apart)
    smooth_DR = jnp.where(size < 1, 0.5 * apart * apart, size - 0.5)
    return jnp.mean(smooth_DR, axis=0)


def _columns(ids: jax.Array | None, tokens_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where tokens are among those that a drafter knows, and whether they are."""
    if ids is None:
        return tokens_R, jnp.ones(tokens_R.shape, bool)
    column_R = jnp.minimum(jnp.searchsorted(ids, tokens_R), len(ids) - 1)
    return column_R, ids[column_R] == tokens_R
