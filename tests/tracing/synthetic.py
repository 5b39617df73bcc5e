"""Traces made from requests of random trees, without a model."""

from __future__ import annotations

import dataclasses

import numpy as np

from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.tracing import build
from treespec_jax.tracing.trace import Trace
from treespec_jax.trees.records import StepRecord, TreeRecord

SOURCES = ("suffix", "recycle", "last logits")
VOCABULARY = 32000


def random_request(steps: int, nodes: int = 31, depth: int = 6, seed: int = 0):
    """A request whose records say that random paths were accepted.

    Some nodes are void, and four steps share a dispatch.
    """
    rng = np.random.default_rng(seed)
    request = Request([1, 2, 3], SamplingParams(max_tokens=10**6))
    request.stats.sources = SOURCES
    request.stats.emitted_counts = [0] * (depth + 2)
    request.stats.prompt_tokens = 3
    request.stats.prefill_seconds = 0.004
    root, clock = 3, 0.004
    trees = [_record(rng, nodes, depth) for _ in range(min(steps, 40))]
    for number in range(steps):
        record = _with_tokens(rng, trees[number % len(trees)], root)
        accepted = record.accepted
        bonus = int(rng.integers(VOCABULARY))
        emitted = [*record.tokens[accepted].tolist(), bonus]
        ranks = [_rank(record, node) for node in accepted]
        step = StepRecord(nodes - 1, ranks, record.sources[accepted].tolist())
        request.records.append(record)
        request.steps.append(step)
        request.stats.record_step(step)
        request.tokens += emitted
        root = bonus
        clock += float(rng.gamma(9, 0.001))
        arrived = (clock, len(emitted))
        if number % 4:
            arrived = (clock, request.arrivals.pop()[1] + len(emitted))
        request.arrivals.append(arrived)
    request.stats.decode_seconds = clock - 0.004
    request.finish_reason = "length"
    return request


def random_trace(steps: int, nodes: int = 31, depth: int = 6, seed: int = 0) -> Trace:
    """Its trace; tokens are shown by their numbers."""
    return build.trace_of(random_request(steps, nodes, depth, seed), "a prompt", "")


def _record(rng, nodes: int, depth: int) -> TreeRecord:
    parents, depths = np.zeros(nodes, int), np.zeros(nodes, int)
    log_prob = np.zeros(nodes)
    for node in range(1, nodes):
        shallow = np.flatnonzero((depths[:node] < depth) & (log_prob[:node] > -np.inf))
        parents[node] = rng.choice(shallow)
        depths[node] = depths[parents[node]] + 1
        log_prob[node] = -rng.exponential(1.2) if rng.random() < 0.95 else -np.inf
    path, here = [0], 0
    while True:
        children = np.flatnonzero((parents == here) & (log_prob > -np.inf))
        children = children[children > 0]
        if not len(children) or rng.random() < 0.3:
            break
        here = int(rng.choice(children))
        path.append(here)
    return TreeRecord(
        parents=parents,
        log_prob=log_prob,
        path=np.array(path + [0] * (depth + 1 - len(path))),
        sources=rng.integers(len(SOURCES), size=nodes),
    )


def _with_tokens(rng, tree: TreeRecord, root: int) -> TreeRecord:
    """The same tree with random tokens and probabilities of the target."""
    nodes = len(tree.parents)
    tokens = rng.integers(VOCABULARY, size=nodes)
    tokens[0] = root
    log_prob = -rng.exponential(2, nodes)
    log_prob[0] = 0
    return dataclasses.replace(
        tree,
        tokens=tokens,
        target_log_prob=log_prob,
        emitted_log_prob=-rng.exponential(1, len(tree.path)),
    )


def _rank(record: TreeRecord, node: int) -> int:
    siblings = record.parents == record.parents[node]
    siblings &= (record.log_prob > -np.inf) & (np.arange(len(siblings)) > 0)
    return int(np.sum(siblings[:node]))
