"""What plain steps tell of a tree, and what they teach a drafter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drafting.heads import eagle
from tests.engine.told import Told
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting.recycle import table_of
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.expectation import observed_shapes, rehearsed_tokens
from treespec_jax.engine.rehearsal import Watching
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY
from treespec_jax.trees.token_tree import TokenTree, ancestors_of

STEPS, DEPTH = 4, 3


def random_tree(rng, nodes: int) -> dict[str, np.ndarray]:
    """A tree of different siblings; some nodes do not exist."""
    parents = np.array([0, *(rng.integers(0, n) for n in range(1, nodes))])
    depth = np.zeros(nodes, np.int32)
    tokens = rng.integers(0, 3, nodes)
    valid = rng.random(nodes) < 0.9
    for node in range(1, nodes):
        depth[node] = depth[parents[node]] + 1
        siblings = [n for n in range(1, node) if parents[n] == parents[node]]
        # More siblings than tokens: the others are nobody's.
        valid[node] &= tokens[node] not in tokens[siblings] and valid[parents[node]]
    valid[0] = True
    return dict(parents=parents, depth=depth, tokens=tokens, valid=valid)


def walk(tree, log_prob, emitted) -> float:
    """The same by a walk down."""

    def children(node):
        numbers = np.arange(1, len(tree["parents"]))
        return [n for n in numbers if tree["parents"][n] == node and tree["valid"][n]]

    def below(node):
        return sum(np.exp(log_prob[n]) * (1 + below(n)) for n in children(node))

    node, tokens = 0, 1.0
    for token in emitted:
        found = [n for n in children(node) if tree["tokens"][n] == token]
        if not found:
            return tokens
        node, tokens = found[0], tokens + 1
    return tokens + below(node)


def part(tree, log_prob, shape) -> np.ndarray:
    """Whether each node is one of the best paths that a smaller tree has room for."""
    path, nodes = np.zeros(len(log_prob)), range(1, len(log_prob))
    for node in nodes:
        real = log_prob[node] if tree["valid"][node] else -np.inf
        path[node] = path[tree["parents"][node]] + real
    # The sort is stable, and the root is no drafted node.
    best = sorted(nodes, key=lambda node: -path[node])[: shape.nodes]
    return np.isin(np.arange(len(path)), [0, *best]) & (tree["depth"] <= shape.depth)


def test_tokens_of_a_step_are_those_of_a_walk():
    """With the whole tree, and with the best part of it."""
    rng = np.random.default_rng(5)
    grown = [random_tree(rng, 12) for _ in range(200)]
    log_prob = np.log(rng.uniform(0.05, 0.3, (200, 12))).astype(np.float32)
    log_prob[:, 0] = 0
    emitted, count = rng.integers(0, 3, (200, STEPS)), rng.integers(0, STEPS + 1, 200)
    stacked = {name: np.stack([tree[name] for tree in grown]) for name in grown[0]}
    log_prob = np.where(stacked["valid"], log_prob, -np.inf).astype(np.float32)
    tree = TokenTree(
        **stacked,
        ancestors=np.asarray(ancestors_of(jnp.asarray(stacked["parents"]), 11)),
        draft_logprob=log_prob,
    )
    parts = [shapes.parse(name) for name in ("dynamic:11@11", "dynamic:4@2", "none")]
    tokens = rehearsed_tokens(parts, tree, emitted, count)
    for number, shape in enumerate(parts[:2]):
        expected = []
        for one, log, said, real in zip(grown, log_prob, emitted, count, strict=True):
            smaller = one | {"valid": one["valid"] & part(one, log, shape)}
            expected.append(walk(smaller, log, said[:real]))
        np.testing.assert_allclose(tokens[:, number], expected, rtol=1e-5)
        assert len({int(x) for x in expected}) > 2, "the trees are worth a test"
    assert (tokens[:, 2] == 1).all()


@pytest.fixture(scope="module", params=["no model", "a layer"])
def engine(request, tiny_draft):
    """Drafters with and without a model, which wait for what they are told."""
    layered = request.param == "a layer"
    model = eagle(tiny_draft, 3, few=True) if layered else None
    settings = SpeculativeConfig(method="auto", tree="auto:6@3", model=model and "tiny")
    made = speculation.make(settings, model)
    assert Watching.fits(made, STEPS)
    config = EngineConfig(
        max_batch=2,
        max_len=128,
        page_size=16,
        steps_per_dispatch=STEPS,
        prefill_chunks=(16,),
    )
    made = Engine(tiny_draft, config, made)
    made._chooser = Told()
    return made


@pytest.fixture(scope="module")
def asked(ragged_prompts):
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    sampled = dataclasses.replace(greedy, temperature=0.6, seed=3)
    return [(ragged_prompts[1] * 3, greedy), (ragged_prompts[2] * 4, sampled)]


def serve(engine, asked, choices) -> list[list[int]]:
    """Runs requests in turn, so that a rehearsal is of one slot."""
    engine.reset()
    requests = [Request(list(prompt), params) for prompt, params in asked]
    for request in requests:
        engine._chooser.choices = list(choices)
        engine.submit(request)
        while engine.busy:
            engine.advance()
        engine.drain()
    return [request.tokens for request in requests]


@pytest.mark.slow
def test_a_rehearsal_says_what_a_tree_would_have_brought(engine, asked):
    layered = engine.speculation.drafter.module is not None
    tree = observed_shapes(engine.speculation.shapes, layered)[-1]
    rehearsal = Choice(ROOT_ONLY, STEPS, True)
    assert tree.depth == (1 if layered else DEPTH) < STEPS
    hits = 0
    for one in asked:
        text = serve(engine, [one], [rehearsal] * 9)
        heard = list(engine._chooser.heard)
        # The last tokens are none to compare a whole tree with.
        for number in range(5):
            again = serve(engine, [one], [rehearsal] * number + [Choice(tree, 1)])
            assert again == text
            assert engine._chooser.tokens[number] == heard[number]
        hits += sum(tokens >= 2 for tokens in heard[:5])
    assert hits, "guesses hit"


@pytest.mark.slow
def test_plain_steps_teach_a_dispatch_at_once_what_they_teach_one_by_one(engine, asked):
    states = []
    for steps, rehearse in ((1, False), (STEPS, False), (3, True)):
        texts = serve(engine, asked, [Choice(ROOT_ONLY, steps, rehearse)] * 99)
        state = engine.draft_state
        table = table_of(engine.speculation.drafter, state)
        known = getattr(state, "sources", state)
        looked = known.texts, table.best, table.logits, known.parts[2].candidates
        states.append(jax.tree.map(np.array, (texts, *looked)))
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    assert np.isfinite(states[0][3]).any()
    programs = {"begin", "prefill", "dispatch", "rehearsal"}
    layered = engine.speculation.drafter.module is not None
    assert set(engine.compilations) == programs | ({"catch_up"} if layered else set())
