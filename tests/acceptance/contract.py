"""What every acceptance rule must hold, whatever it decides by.

Subclass `RuleContract` in a test file and give it a `rule`. Distributions are held
elsewhere (`test_distributions`); here it is the form of a verdict.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax.acceptance import compatibility
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.trees import shapes

B, V = 16, 11
# Of the root of every slot.
POSITION = 7


def settings(temperature) -> Sampling:
    zeros = jnp.zeros(B, jnp.int32)
    return Sampling(
        jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (B,)),
        zeros,
        jnp.ones(B),
        jnp.zeros(B),
        jnp.arange(B, dtype=jnp.uint32),
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """NumPy arrays of a tree, the target's logits [V, B, T] and the verdict."""

    tree: object
    logits: np.ndarray
    verdict: object


def randomness_of(shape, sampling) -> Randomness:
    """Of the step that a drafter and a rule share."""
    root_B = jnp.full(B, POSITION)
    return Randomness(sampling, root_B, shape.num_nodes, shape.depth, V)


@functools.cache
def grower(name: str, proposal: str):
    """Trees of one shape, compiled once for all rules that judge them."""
    shape = shapes.parse(name)

    @jax.jit
    def grow(draft_VBT, sampling, keep_BT):
        context = DraftContext(
            target=None,
            vocab=V,
            active=jnp.ones(B, bool),
            root=jnp.zeros(B, jnp.int32),
            lengths=jnp.full(B, POSITION),
            page_table=jnp.zeros((B, 1), jnp.int32),
            sampling=sampling,
            randomness=randomness_of(shape, sampling),
            proposal=proposal,
        )

        def expand(level, scratch):
            nodes = shape.topology.inner(level.depth)
            return draft_VBT[:, :, nodes].reshape(V, -1), scratch

        tree = growth.grow(shape, context, draft_VBT[:, :, 0], expand, 0.7)
        return dataclasses.replace(tree, valid=tree.valid & keep_BT)

    return grow


class RuleContract:
    """Verdicts are paths from the root, with a token after each node."""

    trees: tuple[str, ...] = ("regular:2x2",)

    @pytest.fixture(scope="class")
    def rule(self) -> Rule:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def judge(self, rule):
        """A verdict on trees of a drafter that is near the target."""

        @functools.partial(jax.jit, static_argnums=0)
        def decide(shape, tree, logits_VBT, sampling):
            randomness = randomness_of(shape, sampling)
            logits_VR = logits_VBT.reshape(V, -1)
            return rule.decide(tree, logits_VR, sampling, randomness, shape.depth)

        def call(name, temperature, keep=None, seed=0) -> Judged:
            shape = shapes.parse(name)
            T, C = shape.num_nodes, shape.depth
            proposal = (
                compatibility.choose_proposal(rule.name, "", shape) if C else "best"
            )
            rng = np.random.default_rng(seed)
            logits = 2 * rng.normal(size=(V, B, T)).astype(np.float32)
            draft = logits + rng.normal(size=logits.shape).astype(np.float32)
            sampling = settings(temperature)
            keep = np.ones((B, T), bool) if keep is None else keep
            tree = grower(name, proposal)(draft, sampling, keep)
            verdict = decide(shape, tree, logits, sampling)
            tree, verdict = jax.tree.map(np.asarray, (tree, verdict))
            return Judged(tree, logits, verdict)

        return call

    def check(self, judged: Judged) -> None:
        """A path of valid nodes, whose tokens are emitted, and one token more."""
        tree, verdict = judged.tree, judged.verdict
        for b in range(B):
            count = verdict.count[b]
            path = verdict.path[b]
            assert path[0] == 0 and not path[count + 1 :].any()
            for depth in range(1, count + 1):
                node = path[depth]
                assert tree.parents[b, node] == path[depth - 1]
                assert tree.valid[b, node] and tree.depth[b, node] == depth
                assert verdict.emitted[b, depth - 1] == tree.tokens[b, node]
            assert 0 <= verdict.emitted[b, count] < V

    def test_it_is_known(self, rule):
        """And hashable, as a static argument of a jitted function must be."""
        assert rule.name in compatibility.RULES
        assert hash(rule) == hash(dataclasses.replace(rule))

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_verdict_is_a_path(self, judge, temperature):
        accepted = 0
        for name in self.trees:
            for seed in range(3):
                judged = judge(name, temperature, seed=seed)
                self.check(judged)
                accepted += judged.verdict.count.sum()
        assert accepted, "it accepted nothing: a dead test"

    def test_greedy_slots_follow_the_targets_tokens(self, judge):
        """Alone, and beside sampled slots."""
        for name in self.trees:
            for temperature in (0.0, np.arange(B) % 2):
                judged = judge(name, temperature)
                self.check(judged)
                best_BT = judged.logits.argmax(axis=0)
                for b in range(0, B, 2):
                    count = judged.verdict.count[b]
                    path = judged.verdict.path[b, : count + 1]
                    emitted = judged.verdict.emitted[b, : count + 1]
                    assert emitted.tolist() == best_BT[b, path].tolist()

    def test_an_invalid_node_is_never_accepted(self, judge):
        for name in self.trees:
            T = shapes.parse(name).num_nodes
            keep = np.random.default_rng(1).random((B, T)) < 0.6
            keep[:, 0] = True
            self.check(judge(name, 1.0, keep))

    def test_a_root_alone_is_plain_decoding(self, judge):
        judged = judge("none", 0.0)
        assert not judged.verdict.count.any()
        best_B = judged.logits[:, :, 0].argmax(axis=0)
        np.testing.assert_array_equal(judged.verdict.emitted[:, 0], best_B)
        self.check(judge("none", 1.0))

    def test_equal_seeds_give_equal_verdicts(self, judge):
        one, two = (judge(self.trees[0], 1.0).verdict for _ in range(2))
        np.testing.assert_array_equal(one.emitted, two.emitted)
