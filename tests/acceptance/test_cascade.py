"""Cascades: their formulas, their exact laws under every rule, and the whole engine.

The policy is written out here once more, token by token, over the enumeration's worlds.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import shipped_law
from tests.acceptance.test_laws import EXACT, RULES, depth_of, meta_of, trees_of
from treespec_jax.acceptance import facts
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes

ALPHAS = (0.0, 0.1, 0.4)


def mixture(name, alpha, p, q):
    """By the paper's words."""
    if name.startswith("token"):
        defer = []
        for v in range(len(p)):
            if name == "token_v1":
                defer.append(q[v] < max(p) - alpha)
            elif name == "token_v2":
                defer.append(p[v] < max(p) - alpha)
            else:
                defer.append(p[v] < (1 - alpha) * max(p))
        moved = sum(q[v] for v in range(len(p)) if defer[v])
        return np.array(
            [(0 if defer[v] else q[v]) + p[v] * moved for v in range(len(p))]
        )
    distance = 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
    if name == "chow":
        defers = max(q) < 1 - alpha
    elif name == "diff":
        defers = max(q) < max(p) - alpha
    else:
        defers = max(q) < max(p) - alpha * distance
    return p if defers else q


def mixed(world, name, alpha):
    """The world whose p is the cascade."""
    other = world.replace()
    other.p = {
        path: mixture(name, alpha, p, world.q[path]) for path, p in world.p.items()
    }
    return other


@dataclasses.dataclass(frozen=True)
class Under:
    """A shipped rule that judges by a shipped cascade."""

    rule: Rule
    cascade: Cascade

    def judge(self, tree, target, uniforms):
        mixed = self.cascade.scores(tree, target.logits)
        target = dataclasses.replace(target, logits=mixed)
        return self.rule.judge(tree, target, uniforms)


@pytest.mark.parametrize("name", facts.CASCADES)
def test_the_policy_is_a_law_and_that_of_the_paper(name):
    deferred = set()
    for alpha in ALPHAS:
        for world in ref.worlds(1):
            p, q = world.p[()], world.q[()]
            want = mixture(name, alpha, p, q)
            with jax.enable_x64(True):
                got = np.asarray(Cascade(name, alpha).mixture(p[:, None], q[:, None]))
            np.testing.assert_allclose(got[:, 0], want, atol=1e-14)
            assert want.sum() == pytest.approx(1.0) and (want >= 0).all()
            deferred |= {"q" if np.allclose(want, q) else "other"}
    assert deferred == {"q", "other"}, "it always decides the same way: a dead test"


@pytest.mark.parametrize("name", facts.CASCADES)
@pytest.mark.parametrize(
    ("rule", "shape"), [("token", "full"), ("block", "chain3"), ("traversal", "full")]
)
def test_every_rule_samples_from_the_cascade(rule, shape, name):
    """The first C tokens follow pi, whose nodes were all expanded.

    The token after a leaf is the target's, as the papers' rules have it on the same
    trees; so is the joint law of all C + 1 tokens.
    """
    depth = depth_of(shape)
    shipped, paper = RULES[rule]
    wrong = 0.0
    for world in ref.worlds(depth)[1::4]:
        trees = trees_of(shape, world)
        meta = meta_of(shape)
        wanted = mixed(world, name, 0.2)
        # What a step's rule looks at: the target itself after the last level.
        judged = wanted.replace()
        judged.p = {
            path: world.p[path] if len(path) == depth else own
            for path, own in wanted.p.items()
        }
        with jax.enable_x64(True):
            law, _ = shipped_law(
                Under(shipped, Cascade(name, 0.2)), world, trees, meta, fill=judged
            )
        own = ref.text_law(judged, trees, paper)
        assert np.abs(law - own).max() < EXACT
        assert np.abs(law - judged.law()).max() < EXACT
        short = law.sum(axis=-1)
        assert np.abs(short - wanted.law().sum(axis=-1)).max() < EXACT
        wrong = max(wrong, np.abs(short - world.law().sum(axis=-1)).max())
    assert wrong > 1e-3, "the cascade is the target: a dead test"


@pytest.mark.parametrize("name", facts.CASCADES)
@pytest.mark.parametrize("shape", ["lopsided", "dynamic5@2"])
@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_any_tree_is_exact_for_a_policy_of_drafter_and_target(rule, shape, name):
    """Where pi is known at leaves too, as a policy that needs no drafter's tree."""
    for world in ref.worlds(depth_of(shape))[2::6]:
        policy = mixed(world, name, 0.2)
        with jax.enable_x64(True):
            law, _ = shipped_law(
                RULES[rule][0], policy, trees_of(shape, world), meta_of(shape)
            )
        assert np.abs(law - policy.law()).max() < EXACT


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_penalties_are_a_policy_like_any_other(rule):
    """Penalised p and q by the path: the same rules, the law of the penalised text."""
    for world in ref.worlds(2)[1::4]:
        penalised = world.replace()
        for laws in (penalised.p, penalised.q):
            for path, own in list(laws.items()):
                worth = own * np.exp(-0.7 * np.bincount(path, minlength=len(own)))
                laws[path] = worth / worth.sum()
        trees = trees_of("full", penalised)
        with jax.enable_x64(True):
            law, _ = shipped_law(RULES[rule][0], penalised, trees, meta_of("full"))
        assert np.abs(law - penalised.law()).max() < EXACT


def test_a_drafter_of_fewer_tokens_has_no_chance_for_the_others():
    world = ref.World(2, 1.0, 0.3, seed=7).replace(
        q=lambda x: np.array([*x[:-1], 0.0]) / x[:-1].sum()
    )
    policy = mixed(world, "token_v3", 0.2)
    judged = policy.replace()
    judged.p = {k: world.p[k] if len(k) == 2 else v for k, v in policy.p.items()}
    with jax.enable_x64(True):
        law, _ = shipped_law(
            Under(RULES["token"][0], Cascade("token_v3", 0.2)),
            world,
            trees_of("full", world),
            meta_of("full"),
            draft_vocab=2,
            fill=judged,
        )
    assert np.abs(law - judged.law()).max() < EXACT


@pytest.mark.parametrize(
    ("rule", "draws", "tree", "cascade", "expected"),
    [
        ("token", "", "chain:2", "chao", "chow, diff"),
        ("token", "", "none", "chow", "take another tree"),
        ("terminal", "", "chain:2", "chow", "rule='token'"),
        ("exact", "shared", "chain:2", "chow", "draws='sampled'"),
        ("block", "", "regular:2", "chow", "chains only"),
    ],
)
def test_what_cannot_serve_a_cascade_is_refused(rule, draws, tree, cascade, expected):
    with pytest.raises(UserError, match=expected):
        facts.choose_draws(rule, draws, shapes.parse(tree), cascade)


def test_a_cascade_keeps_the_drafters_distributions():
    for rule in ("exact", "token", "traversal", "typical"):
        how = facts.choose_draws(rule, "", shapes.parse("dynamic:4@2"), "opt")
        assert how == "sampled"
        assert facts.label(rule, "opt") == "lossy"
    with pytest.raises(UserError, match="alpha"):
        SpeculativeConfig(cascade="chow", alpha=1.5)
