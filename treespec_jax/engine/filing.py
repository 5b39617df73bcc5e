"""What a dispatch emitted, entered in its requests; free of jax."""

from __future__ import annotations

from typing import Any

import numpy as np

from treespec_jax.engine.request import Request
from treespec_jax.trees.records import StepRecord, TreeRecord


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
    counts_S = emission.counts[: int(outbox.steps), index]
    if not counts_S.all():
        # A text that has ended emits nothing more.
        counts_S = counts_S[: int(np.argmin(counts_S))]
    steps, arrived = len(counts_S), int(counts_S.sum())
    emitted_SW = np.arange(emission.tokens.shape[-1]) < counts_S[:, None]
    request.tokens += emission.tokens[:steps, index][emitted_SW].tolist()
    if request.params.logprobs:
        request.logprobs += emission.logprobs[:steps, index][emitted_SW].tolist()
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
