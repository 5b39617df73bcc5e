"""What a dispatch emitted, entered in its requests; free of jax."""

from __future__ import annotations

from typing import Any

import numpy as np

from treespec_jax.engine.request import BestTokens, Request
from treespec_jax.trees.records import StepRecord, TreeRecord


def best_of(
    tokens: np.ndarray, log_probs: np.ndarray, ranks: np.ndarray, count: int
) -> list[BestTokens]:
    """The `count` likeliest of K tokens at n positions.

    Args:
      tokens: int32 [n, K].
      log_probs: float32 [n, K].
      ranks: int32 [n].
      count: at most K.
    """
    some = tokens[:, :count].tolist(), log_probs[:, :count].tolist(), ranks.tolist()
    return [BestTokens(*values) for values in zip(*some, strict=True)]


def enter_prompt(request: Request, scores: Any, start: int, count: int) -> None:
    """Enters what the target says of a chunk of a text, as far as that is the prompt.

    Args:
      request: whose prompt it is.
      scores: `engine.state.PromptScores` of NumPy arrays.
      start: position of the chunk's first token.
      count: tokens of the chunk.
    """
    if start == 0:
        request.prompt_logprobs, request.prompt_top = [None], [None]
    count = min(count, len(request.prompt) - 1 - start)
    request.prompt_logprobs += scores.log_probs[0, :count].tolist()
    if scores.top is not None:
        top = scores.top
        some = [x[0, :count] for x in (top.tokens, top.log_probs, top.ranks)]
        request.prompt_top += best_of(*some, request.params.prompt_logprobs)


def enter(request: Request, outbox: Any, index: int, nodes: int) -> int:
    """Enters tokens, steps and records of one slot.

    Args:
      request: whose slot it is.
      outbox: `engine.state.Outbox` of NumPy arrays.
      index: of the slot.
      nodes: drafted by each step.

    Returns:
      tokens that it emitted.
    """
    emission = outbox.emission
    nodes = nodes if request.params.speculate else 0
    counts_S = emission.counts[: int(outbox.steps), index]
    if not counts_S.all():
        # A text that has ended emits nothing more.
        counts_S = counts_S[: int(np.argmin(counts_S))]
    steps, arrived = len(counts_S), int(counts_S.sum())
    emitted_SW = np.arange(emission.tokens.shape[-1]) < counts_S[:, None]
    request.tokens += emission.tokens[:steps, index][emitted_SW].tolist()
    if request.params.logprobs is not None or request.params.ranked:
        request.logprobs += emission.logprobs[:steps, index][emitted_SW].tolist()
    if request.params.logprobs:
        some = [
            x[:steps, index][emitted_SW]
            for x in (emission.top.tokens, emission.top.log_probs, emission.top.ranks)
        ]
        request.top += best_of(*some, request.params.logprobs)
    if arrived == steps:
        record = StepRecord(nodes, [], [])
        request.steps += [record] * steps
        request.stats.record_step(record, steps)
    else:
        ranks, sources = (
            x[:steps, index].tolist() for x in (emission.ranks, emission.sources)
        )
        for step, count in enumerate(counts_S.tolist()):
            accepted = count - 1
            record = StepRecord(nodes, ranks[step][:accepted], sources[step][:accepted])
            request.steps.append(record)
            request.stats.record_step(record)
    if emission.trees is not None:
        trees = emission.trees
        request.records += [
            TreeRecord(
                trees.parents[step, index],
                trees.log_prob[step, index],
                trees.path[step, index],
                trees.tokens[step, index],
                trees.sources[step, index],
                trees.target_log_prob[step, index],
                emission.logprobs[step, index],
            )
            for step in range(steps)
        ]
    return arrived
