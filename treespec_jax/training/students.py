"""What can be trained to draft: EAGLE layers, Medusa heads, small language models.

A method takes a class here, a line in `STUDENTS` and a word in
`drafter_settings.METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from treespec_jax import checkpoints
from treespec_jax.checkpoints import drafters
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads
from treespec_jax.models.rotary import rotary_angles
from treespec_jax.models.transformer import Transformer
from treespec_jax.training import new_drafter
from treespec_jax.training.answers import MaskedRows
from treespec_jax.training.drafter_settings import DrafterTraining


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taught:
    """What the target says of rows [B, T]; R = B·T columns, B major.

    Attributes:
      tokens: int32 [B, T + 1].
      counts: bool [B, T + 1], tokens that a loss may ask for.
      features: outputs [D, R] of the target's layers that the student reads.
      log_p: float32 [Vd, R], of the tokens that the student knows.
    """

    tokens: jax.Array
    counts: jax.Array
    features: tuple[jax.Array, ...]
    log_p: jax.Array


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Prediction s of all rows.

    Attributes:
      hidden: [D, R], from which `logits` makes them.
      logits: of columns of `hidden`, to float32 [Vd, columns].
      feature: the student's guess of the target's features [D, R] of the row that
        decides the predicted token; None: it makes none.
    """

    hidden: jax.Array
    logits: Callable[[jax.Array], jax.Array]
    feature: jax.Array | None = None


class Student(Protocol):
    """How the drafters of one method are made, run over rows of text, and written.

    For example

      student = STUDENTS["medusa"]
      heads = student.make(config, loaded.model, rows)
      made = student.predictions(heads, taught, count=4)
      made[0].logits(made[0].hidden)  # float32 [Vd, R]

    Attributes:
      first: prediction s of row i is of token i + first + s. Row i holds token i, and
        of the target's features those that token i + 1 was chosen from.
      chained: prediction s of row i is prediction 0 of row i + s, so that only
        prediction 0 is made.
    """

    first: int
    chained: bool

    def make(
        self, config: DrafterTraining, target: Transformer, rows: MaskedRows
    ) -> nnx.Module:
        """A new drafter for a target, its parameters in float32.

        Args:
          config: of the run.
          target: with weights.
          rows: of the training text.

        Raises:
          UserError: the configuration does not go with the target.
        """

    def feature_layers(self, drafter: nnx.Module) -> tuple[int, ...]:
        """Numbers of the target's layers that it reads, as of `EagleConfig`."""

    def token_ids(self, drafter: nnx.Module) -> jax.Array | None:
        """int32 [Vd], ascending, the tokens that it knows; None: all."""

    def shared(self, drafter: nnx.Module) -> set[str]:
        """Names of the parameters that are the target's and stay as they are."""

    def predictions(
        self, drafter: nnx.Module, taught: Taught, count: int
    ) -> list[Prediction]:
        """The first `count` predictions; those past the text mean nothing."""

    def save(
        self, drafter: nnx.Module, target: LoadedModel, path: Path, dtype: str
    ) -> None:
        """Writes a checkpoint that drafts for the target."""


class _Head:
    """What students that read the target's rows have in common."""

    first, chained = 2, False

    def make(self, config, target, rows):
        return new_drafter.make_head(config, target, rows)

    def feature_layers(self, drafter):
        return drafter.config.feature_layers

    def token_ids(self, drafter):
        return None if drafter.token_ids is None else drafter.token_ids[...]

    def shared(self, drafter):
        config = drafter.config
        names = {"embedding": config.shared_embedding, "head": config.shared_head}
        return {name for name, shared in names.items() if shared}

    def save(self, drafter, target, path, dtype):
        drafters.save(drafter, path, target=target, dtype=dtype)


class EagleStudent(_Head):
    """A layer that goes on from the target's features; see `models.eagle`."""

    def predictions(self, drafter, taught, count):
        outputs = unroll(drafter, taught.tokens, taught.features, count)
        return [Prediction(x_DR, drafter.logit_columns, x_DR) for x_DR in outputs]


class MedusaStudent(_Head):
    """Heads on the target's last row; see `models.medusa`."""

    def predictions(self, drafter: MedusaHeads, taught, count):
        following_R = taught.tokens[:, 1:].reshape(-1)
        rows_KDR = drafter.rows(taught.features[0], following_R)
        return [
            Prediction(rows_KDR[s], lambda x_DR, s=s: drafter.unembed(x_DR, s))
            for s in range(count)
        ]


class DraftModelStudent:
    """A small language model of the target's vocabulary, which reads the text alone."""

    first, chained = 1, True

    def make(self, config, target, rows):
        return new_drafter.make_draft_model(config, target)

    def feature_layers(self, drafter):
        return ()

    def token_ids(self, drafter):
        return None

    def shared(self, drafter):
        return set()

    def predictions(self, drafter: Transformer, taught, count):
        assert count == 1, "a chained student makes prediction 0 alone"
        tokens_BT = taught.tokens[:, :-1]
        B, T = tokens_BT.shape
        forward = drafter(
            tokens_BT,
            jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
            jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
        )
        return [Prediction(forward.hidden, drafter.logit_columns)]

    def save(self, drafter, target, path, dtype):
        # The name is that of the run's folder: a checkpoint travels.
        loaded = LoadedModel(
            drafter.config,
            drafter,
            target.tokenizer,
            source=path.absolute().parent.name,
            dtype=jnp.dtype("float32"),
        )
        checkpoints.save(loaded, path, dtype=dtype)


STUDENTS: dict[str, Student] = {
    "eagle": EagleStudent(),
    "eagle3": EagleStudent(),
    "medusa": MedusaStudent(),
    "draft_model": DraftModelStudent(),
}


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
