"""Cascades: their formulas, their exact distributions under every rule, and the whole
engine.

The policy is written out here once more, token by token, over the enumeration's worlds.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import shipped_distribution
from tests.acceptance.policies import greedy_token, mixture
from tests.acceptance.shapes import (
    EXACT,
    RULES,
    TOPOLOGIES,
    best_tree,
    depth_of,
    meta_of,
    trees_of,
)
from treespec_jax.acceptance import compatibility
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.terminal import TerminalRule
from treespec_jax.acceptance.typical import TypicalRule
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes
from treespec_jax.trees.token_tree import Proposal

pytestmark = pytest.mark.slow

ALPHAS = (0.0, 0.1, 0.4)
ONE_TREE = {"terminal": TerminalRule(), "typical": TypicalRule()}


def mixed(world, name, alpha):
    """The world whose p is the cascade."""
    other = world.replace()
    other.p = {
        path: mixture(name, alpha, p, world.q[path]) for path, p in world.p.items()
    }
    return other


@functools.cache
def under(name, alpha, greedy=False):
    """The shipped cascade on one tree or more, none of them alone in its batch.

    Beside each stands a sampled slot, so that greedy ones do not have all of the batch.
    """
    cascade = Cascade(name, alpha)

    @jax.jit
    def scores(tree, scores_VBT):
        B = scores_VBT.shape[1]
        twice = dataclasses.replace(
            tree.proposal,
            log_q=jnp.repeat(tree.proposal.log_q, 2, axis=1),
        )
        slots = jnp.array([greedy, False] * B)
        tree = dataclasses.replace(tree, proposal=twice)
        return cascade.scores(tree, jnp.repeat(scores_VBT, 2, axis=1), slots)[:, ::2]

    return scores


@pytest.mark.parametrize("name", compatibility.CASCADES)
def test_the_policy_is_a_distribution_and_that_of_the_paper(name):
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


@pytest.mark.parametrize("name", compatibility.CASCADES)
@pytest.mark.parametrize(
    ("rule", "shape"), [("token", "full"), ("block", "chain3"), ("traversal", "full")]
)
def test_every_rule_samples_from_the_cascade(rule, shape, name):
    """The first C tokens follow pi, whose nodes were all expanded.

    The token after a leaf is the target's, as the papers' rules have it on the same
    trees; so is the joint distribution of all C + 1 tokens.
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
            distribution, _ = shipped_distribution(
                shipped, world, trees, meta, fill=judged, cascade=under(name, 0.2)
            )
        own = ref.text_distribution(judged, trees, paper)
        assert np.abs(distribution - own).max() < EXACT
        assert np.abs(distribution - judged.distribution()).max() < EXACT
        short = distribution.sum(axis=-1)
        assert np.abs(short - wanted.distribution().sum(axis=-1)).max() < EXACT
        wrong = max(wrong, np.abs(short - world.distribution().sum(axis=-1)).max())
    assert wrong > 1e-3, "the cascade is the target: a dead test"


def judged_by(world, depth, policy):
    """A step's own policy: the target itself after the last level."""
    judged = world.replace()
    judged.p = {
        path: p if len(path) == depth else policy(p, world.q[path])
        for path, p in world.p.items()
    }
    return judged


@pytest.mark.parametrize("name", compatibility.CASCADES)
def test_the_terminal_form_samples_from_the_cascade(name):
    """Its tree, fixed by q alone, keeps q too; as many tokens as by following pi."""
    for world in ref.worlds(2)[1::4]:
        tree = best_tree(world, TOPOLOGIES["full"])
        judged = judged_by(world, 2, functools.partial(mixture, name, 0.2))
        with jax.enable_x64(True):
            distribution, mean = shipped_distribution(
                TerminalRule(),
                world,
                [tree],
                meta_of("full"),
                one_draw=True,
                fill=judged,
                cascade=under(name, 0.2),
            )
        assert np.abs(distribution - judged.distribution()).max() < EXACT
        followed = ref.accepted(ref.follow(judged, tree))
        assert mean == pytest.approx(followed, abs=EXACT)


@pytest.mark.parametrize("name", compatibility.CASCADES)
@pytest.mark.parametrize("rule", [*RULES, "terminal", "typical"])
def test_greedy_slots_follow_the_cascades_token(rule, name):
    """Trees of likeliest tokens, beside a sampled slot: one text up to the last level.

    Under a point mass every rule is exact, typical acceptance too.
    """
    shape = "chain3" if rule == "block" else "full"
    depth = depth_of(shape)
    shipped = {**{k: r for k, (r, _) in RULES.items()}, **ONE_TREE}[rule]
    seen = set()
    for world in ref.worlds(depth)[::3]:
        tree = best_tree(world, TOPOLOGIES[shape])

        def point(p, q):
            token = greedy_token(name, 0.2, p, q)
            seen.add(token == p.argmax())
            return np.eye(3)[token]

        judged = judged_by(world, depth, point)
        with jax.enable_x64(True):
            distribution, _ = shipped_distribution(
                shipped,
                world,
                [tree],
                meta_of(shape),
                one_draw=rule == "terminal",
                fill=judged,
                cascade=under(name, 0.2, greedy=True),
            )
        assert np.abs(distribution - judged.distribution()).max() < EXACT
    assert seen == {True, False}, "it always decides the same way: a dead test"


@pytest.mark.parametrize("name", ["opt", "token_v1"])
def test_one_greedy_slot_or_all_of_them_take_the_same_token(name):
    """Ties go to the first token."""
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet([0.6] * 5, size=(2, 40)).transpose(0, 2, 1)
    p[:, 0], q[:, 1] = 0.2, 0.2
    cascade = Cascade(name, 0.1)
    tree = types.SimpleNamespace(
        proposal=Proposal(jnp.log(q)[:, None], None, range(40), (), ())
    )
    scores = jnp.log(p)[:, None] - 0.5
    alone = cascade.scores(tree, scores, jnp.ones(1, bool))
    twice = jnp.repeat(jnp.log(q)[:, None], 2, axis=1)
    beside = types.SimpleNamespace(proposal=Proposal(twice, None, range(40), (), ()))
    both = cascade.scores(
        beside, jnp.repeat(scores, 2, axis=1), jnp.array([True, False])
    )
    np.testing.assert_array_equal(both[:, 0], alone[:, 0])
    want = [greedy_token(name, 0.1, p[:, e], q[:, e]) for e in range(40)]
    assert np.asarray(alone)[:, 0].argmax(axis=0).tolist() == want
    assert (np.isfinite(alone).sum(axis=0) == 1).all()
    mean = cascade.mixture(p, q)
    np.testing.assert_allclose(np.exp(both[:, 1]), mean, atol=1e-5)


@pytest.mark.parametrize("name", compatibility.CASCADES)
@pytest.mark.parametrize("shape", ["lopsided", "allotted5@2"])
@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_any_tree_is_exact_for_a_policy_of_drafter_and_target(rule, shape, name):
    """Where pi is known at leaves too, as a policy that needs no drafter's tree."""
    for world in ref.worlds(depth_of(shape))[2::6]:
        policy = mixed(world, name, 0.2)
        with jax.enable_x64(True):
            distribution, _ = shipped_distribution(
                RULES[rule][0], policy, trees_of(shape, world), meta_of(shape)
            )
        assert np.abs(distribution - policy.distribution()).max() < EXACT


@pytest.mark.parametrize("rule", [*RULES, "terminal"])
def test_penalties_are_a_policy_like_any_other(rule):
    """p and q penalised by the path: the distribution of the penalised text."""
    shape = "chain3" if rule == "block" else "full"
    for world in ref.worlds(depth_of(shape))[1::4]:
        penalised = world.replace()
        for distributions in (penalised.p, penalised.q):
            for path, own in list(distributions.items()):
                worth = own * np.exp(-0.7 * np.bincount(path, minlength=len(own)))
                distributions[path] = worth / worth.sum()
        with jax.enable_x64(True):
            if rule == "terminal":
                tree = best_tree(penalised, TOPOLOGIES[shape])
                distribution, _ = shipped_distribution(
                    TerminalRule(), penalised, [tree], one_draw=True
                )
            else:
                trees = trees_of(shape, penalised)
                distribution, _ = shipped_distribution(
                    RULES[rule][0], penalised, trees, meta_of(shape)
                )
        assert np.abs(distribution - penalised.distribution()).max() < EXACT


def test_a_drafter_of_fewer_tokens_has_no_probability_for_the_others():
    world = ref.World(2, 1.0, 0.3, seed=7).replace(
        q=lambda x: np.array([*x[:-1], 0.0]) / x[:-1].sum()
    )
    policy = mixed(world, "token_v3", 0.2)
    judged = policy.replace()
    judged.p = {k: world.p[k] if len(k) == 2 else v for k, v in policy.p.items()}
    with jax.enable_x64(True):
        distribution, _ = shipped_distribution(
            RULES["token"][0],
            world,
            trees_of("full", world),
            meta_of("full"),
            draft_vocab=2,
            fill=judged,
            cascade=under("token_v3", 0.2),
        )
    assert np.abs(distribution - judged.distribution()).max() < EXACT


@pytest.mark.parametrize(
    ("rule", "proposal", "tree", "cascade", "expected"),
    [
        ("token", "", "chain:2", "chao", "chow, diff"),
        ("token", "", "none", "chow", "take another tree"),
        ("terminal", "best", "chain:2", "chow", "take proposal='best_kept'"),
        ("exact", "shared", "chain:2", "chow", "proposal='sampled'"),
        ("block", "", "regular:2", "chow", "chains only"),
    ],
)
def test_what_cannot_serve_a_cascade_is_refused(
    rule, proposal, tree, cascade, expected
):
    with pytest.raises(UserError, match=expected):
        compatibility.choose_proposal(rule, proposal, shapes.parse(tree), cascade)


def test_a_cascade_keeps_the_drafters_distributions():
    for rule in ("exact", "token", "traversal", "typical"):
        how = compatibility.choose_proposal(
            rule, "", shapes.parse("allotted:4@2"), "opt"
        )
        assert how == "sampled"
        assert compatibility.label(rule, "opt") == "lossy"
    assert compatibility.choose_proposal(
        "terminal", "", shapes.parse("chain:2"), "opt"
    ) == ("best_kept")
    with pytest.raises(UserError, match="alpha"):
        SpeculativeConfig(cascade="chow", alpha=1.5)
