"""Drafters over the target's rows change no token, whatever shape they grow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drafting.heads import eagle, medusa
from tests.engine.support import run
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.drafting.auto import Auto, AutoOptions
from treespec_jax.drafting.eagle import Eagle
from treespec_jax.drafting.medusa import Medusa
from treespec_jax.engine.engine import Engine
from treespec_jax.speculation import PLAIN, Speculation
from treespec_jax.training import head_losses
from treespec_jax.training.students import STUDENTS
from treespec_jax.trees import shapes

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
# The last Medusa tree is deeper than there are heads.
CASES = (
    ("eagle3", "chain:3"),
    ("eagle3", "regular:2x2x1"),
    ("eagle3", "dynamic:7@3"),
    ("eagle3", "medusa:zephyr_stage2@3"),
    ("eagle1", "dynamic:7@3"),
    ("medusa", "dynamic:7@3"),
    ("medusa", "medusa:zephyr_stage2@3"),
    ("medusa", "chain:5"),
    # Begins with plain steps, whose tree is the root alone.
    ("medusa", "auto:7@3"),
    ("auto", "dynamic:7@3"),
)
CONFIG = EngineConfig(
    max_batch=4, max_len=384, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)


def drafters(target):
    return {
        "eagle1": Eagle(eagle(target, 1), 1.0),
        "eagle3": Eagle(eagle(target, 3, few=True), 1.0),
        "medusa": Medusa(medusa(target, few=True, reads_root=True), 1.0),
        "auto": Auto.make(eagle(target, 3, few=True), 1.0, AutoOptions(history=0)),
    }


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, n).tolist() for n in (1, 17, 300, 5)]


@pytest.fixture(scope="module")
def plain(tiny_target, prompts):
    engine = Engine(tiny_target, CONFIG, PLAIN)
    return {p: [r.tokens for r in run(engine, prompts, p)] for p in (GREEDY, SAMPLED)}


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_tokens_are_those_of_plain_decoding(tiny_target, prompts, plain, name, shape):
    drafter = drafters(tiny_target)[name]
    tree = shapes.parse(shape)
    ladder = getattr(tree, "shapes", (tree,))
    engine = Engine(tiny_target, CONFIG, Speculation(drafter, ladder))
    for params, wanted in plain.items():
        found = run(engine, prompts, params)
        assert [r.tokens for r in found] == wanted
        again = run(engine, prompts[1:2], params)
        assert len(again[0].tokens) == 24


@pytest.mark.parametrize("name", ("eagle1", "eagle3", "medusa"))
def test_drafts_follow_from_the_rows_of_the_text_alone(tiny_target, prompts, name):
    """Whatever the caches went through: the whole text is computed anew here."""
    drafter = drafters(tiny_target)[name]
    engine = Engine(
        tiny_target,
        dataclasses.replace(CONFIG, record=True),
        Speculation(drafter, (shapes.parse("chain:3"),)),
    )
    wanted, drafted = [], []
    for request in run(engine, [prompts[1], prompts[3]], GREEDY):
        text = list(request.prompt)
        for record, step in zip(request.records, request.steps, strict=True):
            assert record.tokens[0] == text[-1]
            wanted.append((len(text) - 2, [*text, *record.tokens[1:]]))
            drafted.append(record.tokens[1:].tolist())
            text += request.tokens[len(text) - len(request.prompt) :][: step.emitted]
    rows = np.zeros((len(wanted), 48), np.int32)
    for row, (_, tokens) in zip(rows, wanted, strict=True):
        row[: len(tokens)] = tokens
    best_SBT = best_predictions(name, tiny_target, drafter.module, jnp.asarray(rows))
    found = [best_SBT[:, i, last].tolist() for i, (last, _) in enumerate(wanted)]
    assert len(found) > 20 and found == drafted


def best_predictions(name, target, head, tokens_BU) -> np.ndarray:
    """int [3, B, T], the likeliest token of the first three predictions of rows."""
    B, T = tokens_BU.shape[0], tokens_BU.shape[1] - 1
    student = STUDENTS["medusa" if name == "medusa" else "eagle"]

    @jax.jit
    def best():
        taught = head_losses.teach(student, head, target, tokens_BU, tokens_BU > 0)
        made = student.predictions(head, taught, 3)
        logits_SVR = jnp.stack([p.logits(p.hidden) for p in made])
        best_SR = jnp.argmax(logits_SVR, axis=1)
        return best_SR if head.token_ids is None else head.token_ids[...][best_SR]

    return np.asarray(best()).reshape(3, B, T)
