"""What drafters over a target's rows are trained on.

Row i of a text holds the target's features of token i. From there a drafter predicts
the tokens after the next: its prediction number s is of token i + 2 + s, which the
target decides at row i + 1 + s. An EAGLE layer makes prediction s from its own outputs
of the predictions before (training-time test, 2503.01840); Medusa's head s makes it
from row i directly. The loss of prediction s is the cross entropy with the target's
own distribution, over the tokens that the drafter knows,

  -Σ_v p(v | tokens to i + 1 + s) · log q_s(v | row i),

weighted by decay^s, of rows whose predicted token the target wrote itself. Tokens that
the drafter does not know take their share of p out of the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.medusa import MedusaHeads
from treespec_jax.models.rotary import rotary_angles
from treespec_jax.models.transformer import Transformer
from treespec_jax.training.drafter_settings import Objective

# Columns of logits over the whole vocabulary that are in memory at once.
COLUMNS = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taught:
    """What the target says of rows [B, T]; R = B·T columns, B major.

    Attributes:
      tokens: int32 [B, T + 1].
      counts: bool [B, T + 1], tokens that a loss may ask for.
      features: per layer [D, R].
      log_p: float32 [Vd, R], of the tokens that the drafter knows.
    """

    tokens: jax.Array
    counts: jax.Array
    features: tuple[jax.Array, ...]
    log_p: jax.Array


Head = EagleModel | MedusaHeads


def teach(
    target: Transformer, drafter: Head, tokens_BU: jax.Array, counts_BU: jax.Array
) -> Taught:
    """Runs the target over rows of U = T + 1 tokens."""
    tokens_BT = tokens_BU[:, :-1]
    B, T = tokens_BT.shape
    layers, last = drafter.config.feature_layers, target.config.num_layers
    forward = target(
        tokens_BT,
        jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
        feature_layers=tuple(sorted({*layers, last})),
    )
    by_layer = dict(zip(sorted({*layers, last}), forward.features, strict=True))
    ids = None if drafter.token_ids is None else drafter.token_ids[...]

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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Prediction s of all rows.

    Attributes:
      hidden: [D, R], from which `logits` makes them.
      logits: of columns of `hidden`, to float32 [Vd, columns].
      feature: the layer's own guess of the target's next row; None for Medusa.
    """

    hidden: jax.Array
    logits: Callable[[jax.Array], jax.Array]
    feature: jax.Array | None = None


def predictions(drafter: Head, taught: Taught, count: int) -> list[Prediction]:
    """The first `count` predictions of every row; those past the text mean nothing."""
    if isinstance(drafter, MedusaHeads):
        rows_KDR = drafter.rows(taught.features[0])
        shared = drafter.config.shared_head
        return [
            Prediction(
                rows_KDR[s],
                lambda x, s=s: drafter.unembed(x, 0 if shared else s),
            )
            for s in range(count)
        ]
    outputs = unroll(drafter, taught.tokens, taught.features, count)
    return [Prediction(x_DR, drafter.logit_columns, x_DR) for x_DR in outputs]


def unroll(
    drafter: EagleModel,
    tokens_BU: jax.Array,
    features: tuple[jax.Array, ...],
    count: int,
) -> list[jax.Array]:
    """An EAGLE layer's outputs [D, R] of `count` passes, each on top of those before.

    In pass s, row i reads token i + 1 + s and what pass s - 1 made of the row; it sees
    rows 0, …, i of pass 0, which hold true features, and its own rows of the passes in
    between, as a branch of a tree would.
    """
    layer = drafter.config.layer
    B, T = tokens_BU.shape[0], tokens_BU.shape[1] - 1
    G = layer.queries_per_kv
    scale = layer.attention_scale or layer.head_dim**-0.5
    causal_TT = jnp.tril(jnp.ones((T, T), bool))
    rows, outputs = [], []
    hidden_DR = drafter.fuse(features)
    for s in range(count):
        tokens_BT = jnp.pad(tokens_BU[:, 1 + s :], ((0, 0), (0, s)))
        positions_BT = jnp.broadcast_to(jnp.arange(T) + s, (B, T))
        cos_sin = rotary_angles(layer.rotary, layer.head_dim, positions_BT.reshape(-1))
        x_ER, residual_DR = drafter.inputs(tokens_BT.reshape(-1), hidden_DR)
        q_BTNH, kv_BK2TH = drafter.attention.project(x_ER, cos_sin, B)
        rows.append(kv_BK2TH)
        q_BTKGH = q_BTNH.reshape(B, T, -1, G, layer.head_dim)
        with jax.named_scope("unrolled_attention"):
            k_BKTH, v_BKTH = rows[0][:, :, 0], rows[0][:, :, 1]
            scores = jnp.einsum(
                "btkgh,bkuh->bkgtu", q_BTKGH, k_BKTH, preferred_element_type=jnp.float32
            )
            scores = [jnp.where(causal_TT, scores, -jnp.inf)]
            for between in rows[1:]:
                one = jnp.einsum(
                    "btkgh,bkth->bkgt",
                    q_BTKGH,
                    between[:, :, 0],
                    preferred_element_type=jnp.float32,
                )
                scores.append(one[..., None])
            weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) * scale, axis=-1)
            weights = weights.astype(v_BKTH.dtype)
            out = jnp.einsum("bkgtu,bkuh->btkgh", weights[..., :T], v_BKTH)
            for number, between in enumerate(rows[1:]):
                part = jnp.einsum(
                    "bkgt,bkth->btkgh", weights[..., T + number], between[:, :, 1]
                )
                out += part
        attended_DR = drafter.attention.combine(out.reshape(q_BTNH.shape))
        hidden_DR = drafter.outputs(residual_DR, attended_DR)
        outputs.append(hidden_DR)
    return outputs


def loss(drafter: Head, taught: Taught, objective: Objective) -> jax.Array:
    """The objective, nats per prediction."""
    B, U = taught.tokens.shape
    T, total = U - 1, 0.0
    made = predictions(drafter, taught, objective.predictions)
    weights = objective.decay ** jnp.arange(objective.predictions)
    weights /= jnp.sum(weights)
    for s, prediction in enumerate(made):
        counts_BT = jnp.pad(taught.counts[:, 2 + s :], ((0, 0), (0, s + 1)))
        counts_R = counts_BT.reshape(B * T)
        number = jnp.maximum(jnp.sum(counts_R), 1)
        log_p_VR = _shifted(taught.log_p, B, s + 1)

        # What a product can make again need not be remembered.
        @jax.checkpoint
        def entropies(hidden_DR, log_p_VR, prediction=prediction):
            log_q_VR = jax.nn.log_softmax(prediction.logits(hidden_DR), axis=0)
            return -jnp.sum(jnp.exp(log_p_VR) * log_q_VR, axis=0)

        entropy_R = entropies(prediction.hidden, log_p_VR)
        part = objective.token_weight * jnp.sum(entropy_R * counts_R) / number
        if objective.feature_weight and prediction.feature is not None:
            wanted_DR = _shifted(taught.features[-1], B, s + 1)
            apart = (prediction.feature - wanted_DR).astype(jnp.float32)
            size = jnp.abs(apart)
            smooth_DR = jnp.where(size < 1, 0.5 * apart * apart, size - 0.5)
            distance = jnp.sum(jnp.mean(smooth_DR, axis=0) * counts_R) / number
            part += objective.feature_weight * distance
        total += weights[s] * part
    return total


def _shifted(x_XR: jax.Array, batch: int, by: int) -> jax.Array:
    """Columns of rows i + by in the place of rows i; the last ones are repeated."""
    x_XBT = x_XR.reshape(x_XR.shape[0], batch, -1)
    moved = x_XBT[:, :, by:]
    last = jnp.repeat(x_XBT[:, :, -1:], by, axis=2)
    return jnp.concatenate([moved, last], axis=2).reshape(x_XR.shape)


def ranks(drafter: Head, taught: Taught, count: int) -> tuple[jax.Array, jax.Array]:
    """At which rank each prediction has the token that the text goes on with.

    Returns:
      int32 [S, B, T], Vd for a token that the drafter does not know; and bool
      [S, B, T], whether there is such a token and it counts.
    """
    B, U = taught.tokens.shape
    T, found, valid = U - 1, [], []
    vocab = drafter.config.draft_vocab
    for s, prediction in enumerate(predictions(drafter, taught, count)):
        wanted_BT = jnp.pad(taught.tokens[:, 2 + s :], ((0, 0), (0, s + 1)))
        counts_BT = jnp.pad(taught.counts[:, 2 + s :], ((0, 0), (0, s + 1)))
        wanted_R = wanted_BT.reshape(-1)
        column_R, has_R = wanted_R, jnp.ones(wanted_R.shape, bool)
        if drafter.token_ids is not None:
            ids = drafter.token_ids[...]
            column_R = jnp.minimum(jnp.searchsorted(ids, wanted_R), vocab - 1)
            has_R = ids[column_R] == wanted_R
        logits_VR = prediction.logits(prediction.hidden)
        chosen_R = jnp.take_along_axis(logits_VR, column_R[None], axis=0)
        rank_R = jnp.sum(logits_VR > chosen_R, axis=0, dtype=jnp.int32)
        found.append(jnp.where(has_R, rank_R, vocab).reshape(B, T))
        valid.append(counts_BT)
    return jnp.stack(found), jnp.stack(valid)


@dataclasses.dataclass(frozen=True)
class Split:
    """A drafter's leaves: those that are trained, and those that stay.

    Attributes:
      flat: the drafter.
      trained: bool per leaf of `flat`.
    """

    flat: FlatModule
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, drafter: Head) -> Split:
        """All parameters are trained but those that are the target's."""
        config = drafter.config
        shared = {"head"} if config.shared_head else set()
        if getattr(config, "shared_embedding", False):
            shared.add("embedding")
        trained = tuple(
            isinstance(leaf, nnx.Param) and str(path[0]) not in shared
            for path, leaf in nnx.to_flat_state(nnx.state(drafter))
        )
        return cls(FlatModule(drafter), trained)

    def leaves(self, trained: bool) -> tuple[jax.Array, ...]:
        """Those that are trained, or those that stay."""
        pairs = zip(self.flat.leaves, self.trained, strict=True)
        return tuple(leaf for leaf, is_trained in pairs if is_trained == trained)

    def bind(self, trained: Any, fixed: Any) -> Head:
        """The drafter with these leaves."""
        trained, fixed = iter(trained), iter(fixed)
        return self.flat.bind(
            tuple(next(trained if t else fixed) for t in self.trained)
        )
