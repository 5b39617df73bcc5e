"""Whatever is idle keeps its state: every drafter, every rule, pauses at random.

Steps of a run whose slots pause are those of a run without pauses: the same text, as
many accepted tokens in every step, and a drafter that stands where the target does.
So it is in slots that another text has left.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.drafting.heads import eagle, medusa
from tests.engine import small
from tests.engine.pauses import B, Bench, Phase, by_slot, paused, unpaused
from tests.oracles import full_logits
from treespec_jax import speculation
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.compatibility import RULES
from treespec_jax.config import SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.drafting.draft_model import DraftModelState
from treespec_jax.drafting.eagle import EagleState
from treespec_jax.drafting.matches import Texts
from treespec_jax.trees.shapes import ROOT_ONLY

TREE_STEPS, PLAIN_STEPS = 7, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A drafter, what it grows, and who judges it.

    Attributes:
      method: of `drafting.METHODS`.
      tree: shape.
      rule: of `compatibility.RULES`.
      model: its kind, if it has one.
      options: of the method.
      cascade: a policy between drafter and target.
      plain: whether steps without a tree come between those with one.
    """

    method: str
    tree: str
    rule: str
    model: str = ""
    options: tuple[tuple[str, int | str], ...] = ()
    cascade: Cascade | None = None
    plain: bool = False


_FEW = ("history", 0), ("longest", 3)
CASES = {
    "draft_model": Case(
        "draft_model",
        "regular:2x1",
        "exact",
        "model",
        cascade=Cascade("token_v3", 0.3),
    ),
    "eagle": Case("eagle", "chain:2", "exact", "layer", plain=True),
    "medusa": Case("medusa", "allotted:4@2", "traversal", "heads"),
    "ngram": Case("ngram", "chain:3", "block", options=_FEW),
    "suffix": Case("suffix", "regular:2x1", "typical", options=_FEW),
    "recycle": Case(
        "recycle", "dynamic:4@2", "terminal", options=(("scope", "request"),)
    ),
    "last_logits": Case("last_logits", "chain:2", "token", plain=True),
    "auto": Case("auto", "dynamic:4@2", "exact", "layer", options=_FEW),
}


def test_the_cases_are_all_drafters_and_rules():
    assert {case.method for case in CASES.values()} | {"none"} == set(METHODS)
    assert {case.rule for case in CASES.values()} == set(RULES)


def drafting_model(kind: str, target):
    return {
        "": lambda: None,
        "model": lambda: small.between(0, 1),
        "layer": lambda: eagle(target, 3),
        "heads": lambda: medusa(target, heads=2),
    }[kind]()


@pytest.fixture(scope="module")
def target():
    return small.model(0)


@pytest.fixture(scope="module")
def prompts():
    """From one token to several chunks, with a repetition."""
    rng = np.random.default_rng(2)
    return [[1, 4, 2, 1, 4, 2, 1], rng.integers(0, small.V, 11).tolist(), [3]]


def phases_of(case: Case, shapes) -> list[Phase]:
    tree = Phase(shapes[0], TREE_STEPS)
    return [tree, Phase(ROOT_ONLY, PLAIN_STEPS), tree] if case.plain else [tree, tree]


def check_position(state, texts) -> None:
    """The drafter has, or has to take in, all that was said up to the newest token."""
    roots = np.array([text.length for text in texts])

    def check(x):
        if isinstance(x, DraftModelState):
            # A layer's row pairs a token with the row before it.
            ahead = 0 if isinstance(x, EagleState) else 1
            behind = 0 if x.backlog is None else x.backlog.count
            known = x.lengths + x.pending_count + behind
            np.testing.assert_array_equal(known, roots + ahead)
            for pending, count, text in zip(
                x.pending, x.pending_count, texts, strict=True
            ):
                said = [*text.prompt, *text.tokens]
                assert pending[:count].tolist() == said[len(said) - count :]
        if isinstance(x, Texts):
            np.testing.assert_array_equal(x.lengths, roots + 1)
            for row, length, text in zip(x.text, x.lengths, texts, strict=True):
                assert row[:length].tolist() == [*text.prompt, *text.tokens]

    parts = (DraftModelState, Texts)
    jax.tree.map(check, state, is_leaf=lambda x: isinstance(x, parts))


@pytest.mark.parametrize("name", CASES)
def test_a_pause_changes_nothing(name, target, prompts):
    case = CASES[name]
    made = speculation.make(
        SpeculativeConfig(
            method=case.method,
            model=case.model or None,
            tree=case.tree,
            rule=case.rule,
            cascade=case.cascade.name if case.cascade else "",
            alpha=case.cascade.alpha if case.cascade else 0.1,
            options=dict(case.options),
        ),
        drafting_model(case.model, target),
    )
    if case.plain:
        made = dataclasses.replace(made, shapes=(made.shape, ROOT_ONLY))
    bench, phases = Bench(target, made), phases_of(case, made.shapes)
    whole = unpaused(bench, prompts, phases)
    state = bench.draft_state
    check_position(state, whole)
    steps = sum(phase.steps for phase in phases)
    accepted = sum(len(text.tokens) for text in whole) - B * steps
    assert accepted > 4, "hardly a drafted token was right: a dead test"
    unpaused(bench, prompts[::-1], phases)
    for seed in range(3):
        found = paused(bench, whole, phases, seed)
        for text, want in zip(found, whole, strict=True):
            assert text.tokens == want.tokens
            assert text.ends == want.ends
            np.testing.assert_allclose(text.log_probs, want.log_probs, atol=1e-4)
        after = bench.draft_state
        check_position(after, found)
        for one, other in zip(by_slot(state), by_slot(after), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
    if case.rule == "exact":
        check_cuts(case, bench, whole, phases)


def check_cuts(case, bench, whole, phases) -> None:
    """Pages may end within a step, which goes on from there in the next dispatch."""
    for seed in range(2):
        found = paused(bench, whole, phases, seed, cut=True)
        check_position(bench.draft_state, found)
        assert sum(len(text.ends) for text in found) > sum(
            len(text.ends) for text in whole
        ), "no step was cut: a dead test"
        if not case.cascade:
            assert [t.tokens for t in found] == [t.tokens for t in whole]
            continue
        # Where a step begins says whose word is taken, the target's or the drafter's.
        models = small.model(0), small.between(0, 1)
        greedy = found[0]
        text = [*greedy.prompt, *greedy.tokens]
        choices = np.stack([full_logits(m, text, size=64).argmax(1) for m in models])
        first = len(greedy.prompt) - 1
        assert (choices[:, first:-1] == greedy.tokens).any(axis=0).all()
