"""What drafters are trained on, against plain loops and the drafters' own passes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import TINY
from tests.drafting import heads
from tests.training.drafters import T, rows
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.training import head_losses
from treespec_jax.training.drafter_settings import Objective
from treespec_jax.training.losses import row_logits
from treespec_jax.training.students import STUDENTS, unroll

B, S = 2, 3


@pytest.mark.parametrize("generation", [1, 3])
def test_unroll_is_the_layer_on_a_branch(generation, tiny_target):
    """Pass s of row i is node s of a branch below rows of true features."""
    drafter = heads.eagle(tiny_target, generation)
    tokens_BU = rows(B).tokens
    count = len(drafter.config.feature_layers)
    shape = count, TINY.embed_dim, B * T
    features = tuple(jax.random.normal(jax.random.key(1), shape))
    flat = FlatModule(drafter)

    @jax.jit
    def unrolled(leaves):
        model = flat.bind(leaves)
        return model.fuse(features), unroll(model, tokens_BU, features, S)

    @jax.jit
    def chain(leaves, tokens_T, hidden_DT):
        mask_1TT, positions_1T = (
            jnp.tril(jnp.ones((1, T, T), bool)),
            jnp.arange(T)[None],
        )
        model = flat.bind(leaves)
        return model(tokens_T[None], hidden_DT, positions_1T, mask_1TT).hidden

    fused_DR, outputs = unrolled(flat.leaves)
    for b, i in [(0, 0), (1, 4), (1, T - S)]:
        # Rows 0, …, i of the text, then the branch; no row sees a later one.
        hidden_DT = np.zeros((fused_DR.shape[0], T), np.float32)
        hidden_DT[:, : i + 1] = fused_DR[:, b * T : b * T + i + 1]
        for s in range(S):
            made_DT = chain(flat.leaves, tokens_BU[b, 1:], hidden_DT)
            node_D = made_DT[:, i + s]
            np.testing.assert_allclose(
                outputs[s][:, b * T + i], node_D, rtol=2e-4, atol=2e-5
            )
            if i + s + 1 < T:
                hidden_DT[:, i + s + 1] = node_D


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, whether it knows few of the tokens, and what is minimised."""

    method: str
    few: bool = False
    objective: Objective = Objective(predictions=S, decay=0.5)

    def drafter(self, target) -> nnx.Module:
        if self.method == "draft_model":
            small = dataclasses.replace(TINY, num_layers=1, embed_dim=16)
            return Transformer(small, rngs=nnx.Rngs(5))
        if self.method == "medusa":
            made = heads.medusa(target, S, self.few, reads_root=True)
            shape = made.weight[...].shape
            made.weight[...] = jax.random.normal(jax.random.key(2), shape)
            return made
        return heads.eagle(target, 3 if self.method == "eagle3" else 1, self.few)


CASES = [
    Case("eagle", objective=Objective(S, 0.5, token_weight=0.3, feature_weight=0.7)),
    Case("eagle3", few=True),
    Case("medusa", few=True),
    Case("draft_model"),
]


@dataclasses.dataclass
class Looked:
    """What a case comes to, and the logits that it should come from."""

    loss: float
    ranks: np.ndarray
    valid: np.ndarray
    target: np.ndarray  # [B, T, V]
    drafter: np.ndarray  # [S, B, T, Vd]
    features: np.ndarray | None  # [S + 1, B, T, D], the target's last


@functools.cache
def look(case: Case, target: Transformer) -> Looked:
    student, drafter = STUDENTS[case.method], case.drafter(target)
    given, flat, flat_target = rows(B), FlatModule(drafter), FlatModule(target)

    @jax.jit
    def run(leaves, target_leaves):
        model, its = flat.bind(leaves), flat_target.bind(target_leaves)
        taught = head_losses.teach(student, model, its, given.tokens, given.written)
        made = student.predictions(model, taught, 1 if student.chained else S)
        return (
            head_losses.loss(student, model, taught, case.objective),
            head_losses.ranks(student, model, taught, S),
            row_logits(its, jnp.asarray(given.tokens[:, :-1])),
            [prediction.logits(prediction.hidden) for prediction in made],
            [prediction.feature for prediction in made],
            taught.features,
        )

    loss, ranks, of_target, logits, guessed, features = run(
        flat.leaves, flat_target.leaves
    )

    def by_row(x):
        return np.asarray(x).T.reshape(B, T, -1).astype(np.float64)

    logits = [by_row(x) for x in logits]
    if student.chained:
        # Prediction s of row i is what the model says at row i + s.
        logits = [np.roll(logits[0], -s, axis=1) for s in range(S)]
    rows_ = None
    if case.method == "eagle":
        rows_ = np.stack([by_row(x) for x in [*guessed, features[-1]]])
    of_target = np.asarray(of_target, np.float64).reshape(B, T, -1)
    return Looked(
        float(loss),
        np.asarray(ranks[0]),
        np.asarray(ranks[1]),
        of_target,
        np.stack(logits),
        rows_,
    )


@pytest.fixture(autouse=True)
def few_columns(monkeypatch):
    """The target's logits are made in five runs, the last of them padded."""
    monkeypatch.setattr(head_losses, "COLUMNS", 5)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_loss_is_that_of_plain_loops(case, tiny_target):
    found, given = look(case, tiny_target), rows(B)
    first, objective = STUDENTS[case.method].first, case.objective
    ids = np.arange(heads.FEW) * 2 + 1 if case.few else np.arange(TINY.vocab_size)
    count = 1 if case.method == "draft_model" else S
    total = weights = 0.0
    for s in range(count):
        parts = []
        for b in range(B):
            for i in range(T):
                wanted = i + first + s
                if wanted > T or not given.written[b, wanted]:
                    continue
                p = softmax(found.target[b, wanted - 1])[ids]
                part = -(p * np.log(softmax(found.drafter[s, b, i]))).sum()
                part *= objective.token_weight
                if objective.feature_weight:
                    apart = found.features[s, b, i] - found.features[S, b, wanted - 1]
                    huber = [0.5 * x * x if abs(x) < 1 else abs(x) - 0.5 for x in apart]
                    part += objective.feature_weight * np.mean(huber)
                parts.append(part)
        total += objective.decay**s * np.mean(parts)
        weights += objective.decay**s
    assert found.loss == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_ranks_are_found_by_counting(case, tiny_target):
    found, given = look(case, tiny_target), rows(B)
    first, unknown = STUDENTS[case.method].first, 0
    ids = list(np.arange(heads.FEW) * 2 + 1 if case.few else range(TINY.vocab_size))
    for s in range(S):
        for b in range(B):
            for i in range(T):
                wanted = i + first + s
                counts = wanted <= T and given.written[b, wanted]
                assert found.valid[s, b, i] == counts
                if not counts:
                    continue
                token, logits = given.tokens[b, wanted], found.drafter[s, b, i]
                rank = len(ids)
                if token in ids:
                    rank = sum(logits > logits[ids.index(token)])
                unknown += token not in ids
                assert found.ranks[s, b, i] == rank
    assert bool(unknown) == case.few
