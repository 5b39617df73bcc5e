"""Figures over the steps of a trace; the page computes the same in its script."""

from __future__ import annotations

import math
from collections.abc import Sequence

from treespec_jax.tracing.trace import Step, Trace

BINS = 10


def acceptance_by_depth(steps: Sequence[Step]) -> list[float]:
    """Share of steps that accepted a node at depth 1, 2, …; see `Stats`."""
    deepest = max((len(step.accepted) for step in steps), default=0)
    return [
        sum(len(step.accepted) >= depth for step in steps) / len(steps)
        for depth in range(1, deepest + 1)
    ]


def accepted_by_source(trace: Trace) -> dict[str, int]:
    """Accepted nodes by the name of where they came from; see `Stats`."""
    counts = dict.fromkeys(trace.sources, 0)
    for step in trace.steps:
        for node in step.accepted:
            counts[trace.sources[step.sources[node]]] += 1
    return counts


def reliability(steps: Sequence[Step]) -> list[dict[str, float]]:
    """How often the drafter's estimates came true, by estimate.

    Of nodes whose parent was accepted, which are those that a step decided about.

    Returns:
      for each of ten bins that is not empty: `estimate`, the mean one; `accepted`, the
      share that was; `target`, the mean probability under the target; and `nodes`.
    """
    bins: list[list[tuple[float, float, bool]]] = [[] for _ in range(BINS)]
    for step in steps:
        accepted = {0, *step.path}
        for node in range(1, len(step.parents)):
            if step.parents[node] in accepted:
                estimate = math.exp(step.draft_log_prob[node])
                target = math.exp(step.target_log_prob[node])
                number = min(BINS - 1, int(BINS * estimate))
                bins[number].append((estimate, target, node in accepted))
    rows = []
    for found in filter(None, bins):
        columns = zip(*found, strict=True)
        estimate, target, accepted = (sum(x) / len(found) for x in columns)
        rows.append(
            {
                "estimate": estimate,
                "target": target,
                "accepted": accepted,
                "nodes": len(found),
            }
        )
    return rows


def seconds_per_dispatch(trace: Trace) -> list[float]:
    """Seconds between arrivals; the first counts from the end of the prefill.

    What is compiled for a text is compiled before its first tokens arrive.
    """
    # Older traces count compiling as prefill or decoding.
    compiling = trace.stats.get("compile_seconds", 0.0)
    prefilled = trace.stats["prefill_seconds"] + compiling
    before = min(prefilled, *trace.arrivals[:1], math.inf)
    times = [before, *trace.arrivals]
    return [after - start for start, after in zip(times, times[1:], strict=False)]


def layout(step: Step) -> list[tuple[int, float]]:
    """Depth and row of every node, and of the bonus if there is one.

    A leaf has a row of its own; a node stands in the middle of its children.
    """
    parents = list(step.parents)
    if step.has_bonus:
        parents.append(step.path[-1] if step.path else 0)
    children: list[list[int]] = [[] for _ in parents]
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
        depths[node] = depths[parents[node]] + 1
    rows, leaves = [0.0] * len(parents), 0
    waiting = [(0, False)]
    while waiting:
        node, visited = waiting.pop()
        if not children[node]:
            rows[node] = leaves
            leaves += 1
        elif visited:
            rows[node] = (rows[children[node][0]] + rows[children[node][-1]]) / 2
        else:
            waiting.append((node, True))
            waiting += [(child, False) for child in reversed(children[node])]
    return list(zip(depths, map(float, rows), strict=True))
