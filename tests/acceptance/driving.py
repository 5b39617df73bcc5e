"""Drives shipped, jitted rules through an enumeration instead of sampling them.

Given the tree, a rule compares each node's uniform with a number that depends on no
uniform, `Judgement.probability`. A uniform below it is as good as any other below it;
so the interval [0, 1) falls into two parts, and one point inside each (the middle)
stands for all of it, with the part's length as its weight. All combinations of parts
over the nodes, weighted by the product of their lengths, are the exact distribution of
the rule's decision; whether the number is the right one shows in that distribution. The
last token is sampled by inversion of `Judgement.weights`; their normalised entries are
taken as its distribution, and `tests/sampling/test_draw.py` holds that inversion to it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.acceptance.enumeration import Tree, World
from tests.oracles import sampling
from treespec_jax.acceptance.protocol import UNSEEN
from treespec_jax.acceptance.uniform import Target
from treespec_jax.config import SamplingParams
from treespec_jax.sampling import draw
from treespec_jax.sampling.streams import Uniforms
from treespec_jax.trees.token_tree import Proposal, TokenTree

# Rows of one call: one compilation per tree shape and rule.
ROWS = 4096


@functools.partial(jax.jit, static_argnums=0)
def judge(rule, tree, logits, accept):
    """Accepted node, distribution of the next token, probabilities."""
    zeros = jnp.zeros((accept.shape[0], 2), accept.dtype)
    settings = sampling(SamplingParams(temperature=1.0), accept.shape[0])
    judgement = rule.judge(tree, Target(logits, settings), Uniforms(accept, zeros))
    mass = judgement.weights / jnp.sum(judgement.weights, axis=0)
    return judgement.node, mass, judgement.probability


def _log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


def arrays(world: World, trees: list[Tree], meta: dict | None):
    """TokenTree of numpy arrays, one slot per tree, and log p [V, B, T].

    Args:
      world: of p and q.
      trees: all of one shape.
      meta: static fields of `Proposal`; None: the tree has none.
    """
    B, T, V = len(trees), len(trees[0].parents), world.vocab
    parents = np.array([t.parents for t in trees], np.int32)
    ancestors = np.zeros((B, T, T), bool)
    ancestors[:, np.arange(T), np.arange(T)] = True
    for n in range(1, T):
        ancestors[:, n] |= ancestors[np.arange(B), parents[:, n]]
    valid = np.array([t.valid for t in trees])
    # Nobody may look at the distributions of an invalid node.
    scores = np.full((V, B, T), 0.0)
    tokens = np.zeros((B, T), np.int32)
    for b, tree in enumerate(trees):
        for n, path in enumerate(tree.paths):
            if path is not None:
                scores[:, b, n] = _log(world.p[path]) + 0.1 * n
                tokens[b, n] = path[-1] if path else 0
    proposal = None
    if meta is not None:
        own = np.full((V, B, len(meta["nodes"])), 0.0)
        for b, tree in enumerate(trees):
            for e, n in enumerate(meta["nodes"]):
                if tree.paths[n] is not None:
                    own[:, b, e] = world.q[tree.paths[n]]
        left = np.array([t.left for t in trees])
        proposal = Proposal(_log(own), left, **meta)
    tree = TokenTree(
        tokens=tokens,
        parents=parents,
        depth=ancestors.sum(axis=2, dtype=np.int32) - 1,
        ancestors=ancestors,
        valid=valid,
        draft_logprob=_log(np.where(valid, [t.shares for t in trees], 0)),
        proposal=proposal,
    )
    return tree, scores


def _rows(tree: TokenTree, scores, at):
    """The slots `at` of a batch."""
    proposal = tree.proposal
    if proposal is not None:
        proposal = dataclasses.replace(
            proposal,
            log_q=proposal.log_q[:, at],
            remaining=proposal.remaining[at],
        )
    plain = dataclasses.replace(tree, proposal=None)
    plain = jax.tree.map(lambda x: x[at], plain)
    return dataclasses.replace(plain, proposal=proposal), scores[:, at]


def _judged(rule, tree, scores, accept):
    """`judge` in chunks of ROWS, the last one padded."""
    outs = []
    count = len(accept)
    for first in range(0, count, ROWS):
        at = np.arange(first, first + ROWS)
        padded = np.minimum(at, count - 1)
        own, own_scores = _rows(tree, scores, padded)
        out = judge(rule, own, own_scores, accept[padded])
        keep = int((at < count).sum())
        node, mass, probability = (np.asarray(x) for x in out)
        outs.append((node[:keep], mass[:, :keep], probability[:keep]))
    return (
        np.concatenate([o[0] for o in outs]),
        np.concatenate([o[1] for o in outs], axis=1),
        np.concatenate([o[2] for o in outs]),
    )


def _branches(rule, tree, scores, tolerance):
    """All combinations of the parts: slot, weight and uniforms of each.

    A rule need not look at nodes that no longer matter: their probability is UNSEEN.
    Nor need it give a node's last word before its uniform is close: wherever the number
    falls inside the part that a row stands for, the part falls in two.
    """
    B, T = tree.tokens.shape
    slot, weight = np.arange(B), np.ones(B)
    low, high = np.zeros((B, T)), np.ones((B, T))
    while True:
        accept = (low + high) / 2
        own, own_scores = _rows(tree, scores, slot)
        _, _, probability = _judged(rule, own, own_scores, accept)
        probability = probability.astype(float)
        assert np.isfinite(probability).all()
        seen = probability != UNSEEN
        assert (probability[seen] >= 0).all() and (
            probability[seen] <= 1 + tolerance
        ).all()
        inside = seen & (low < probability) & (probability < high)
        inside[:, 0] = False
        if not inside.any():
            return slot, weight, accept
        for n in range(1, T):
            own = inside[:, n]
            edge = probability[own, n]
            share = (edge - low[own, n]) / (high[own, n] - low[own, n])
            below, above = high[own].copy(), low[own].copy()
            below[:, n] = above[:, n] = edge
            rest = [x[~own] for x in (slot, weight, low, high, probability, inside)]
            same = (
                slot[own],
                weight[own],
                low[own],
                high[own],
                probability[own],
                inside[own],
            )
            parts = [
                rest,
                [same[0], same[1] * share, same[2], below, *same[4:]],
                [same[0], same[1] * (1 - share), above, *same[3:]],
            ]
            slot, weight, low, high, probability, inside = (
                np.concatenate(x) for x in zip(*parts, strict=True)
            )
            some = weight > 0
            slot, weight, low, high, probability, inside = (
                x[some] for x in (slot, weight, low, high, probability, inside)
            )


def shipped_distribution(
    rule,
    world: World,
    trees: list[Tree],
    meta=None,
    one_draw=False,
    tolerance=1e-12,
    draft_vocab=None,
    fill=None,
    cascade=None,
):
    """Distribution of the first C + 1 tokens, as `enumeration.text_distribution`; the
    mean accepted.

    Args:
      rule: a `UniformRule`; run it with 64 bits enabled for float64.
      world: of p and q.
      trees: with their probabilities.
      meta: see `arrays`.
      one_draw: the rule draws the last node by the first uniform (terminal form).
      tolerance: of probabilities above 1.
      draft_vocab: rows of the drafter's distributions, if fewer than V.
      fill: the world of what a step leaves open, if it is another.
      cascade: log pi of a tree and log p; the rule judges by it, and is compiled once
        for all of them.
    """
    tree, scores = arrays(world, trees, meta)
    if draft_vocab is not None:
        short = tree.proposal.log_q[:draft_vocab]
        proposal = dataclasses.replace(tree.proposal, log_q=short)
        tree = dataclasses.replace(tree, proposal=proposal)
    if cascade is not None:
        scores = np.asarray(cascade(tree, scores))
    B, T = tree.tokens.shape
    if one_draw:
        _, _, probability = _judged(rule, tree, scores, np.zeros((B, T)))
        slot, part = (x.ravel() for x in np.mgrid[:B, :T])
        weight = probability[slot, part] / probability[slot].sum(axis=1)
        ends = np.cumsum(probability, axis=1)
        accept = np.zeros((B * T, T))
        accept[:, 0] = ends[slot, part] - probability[slot, part] / 2
    else:
        slot, weight, accept = _branches(rule, tree, scores, tolerance)
    some = weight > 0
    slot, weight, accept = slot[some], weight[some], accept[some]
    big, big_scores = _rows(tree, scores, slot)
    node, mass, _ = _judged(rule, big, big_scores, accept)
    assert np.isfinite(mass).all() and (mass >= 0).all()
    weight, mass = weight.astype(float), mass.astype(float)
    distribution = np.zeros((world.vocab,) * (world.depth + 1))
    total: dict = {}
    for row, (b, n) in enumerate(zip(slot, node, strict=True)):
        path = trees[b].paths[n]
        assert path is not None, "an invalid node was accepted"
        own = trees[b].probability * weight[row] * mass[:, row]
        total[path] = total.get(path, 0.0) + own
    mean = 0.0
    for path, masses in total.items():
        mean += len(path) * masses.sum()
        for y in range(world.vocab):
            (fill or world).fill(distribution, (*path, y), masses[y])
    return distribution, mean


def last_tokens(mass, uniforms):
    """`draw.one` of one column for many uniforms."""
    mass = jnp.broadcast_to(jnp.asarray(mass)[:, None], (len(mass), len(uniforms)))
    return np.asarray(draw.one(mass, jnp.asarray(uniforms)))
