"""How often the drafter's estimates come true, and the tau that makes them.

A child's probability of being right is estimated by softmax(v / tau) over its siblings'
scores v = log q + g. Recorded probabilities of siblings give v up to a constant, so
that a record taken under one tau can be read under any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from treespec_jax.trees.records import TreeRecord

BINS = 10
# Least and largest tau that a fit can give.
_RANGE = (0.02, 50.0)


def accepted_by_rank(records: Iterable[TreeRecord]) -> list[int]:
    """Accepted nodes that were first, second, … among their siblings."""
    counts: list[int] = []
    for record in records:
        for children, right in record.families():
            if right is not None:
                rank = int(np.flatnonzero(children == right)[0])
                counts += [0] * (rank + 1 - len(counts))
                counts[rank] += 1
    return counts


def retempered(
    records: Iterable[TreeRecord], tau: float, wanted: float
) -> list[TreeRecord]:
    """Records as another tau would have estimated them.

    Siblings that a tree did not hold keep their share of the estimate, so that this is
    exact only where a family holds all that its probabilities were normalised over.
    """
    out = []
    for record in records:
        probability = record.log_prob.astype(float).copy()
        for parent in np.unique(record.parents):
            children = np.flatnonzero(
                (record.parents == parent) & (probability > -np.inf)
            )
            children = children[children > 0]
            if len(children):
                held = np.log(np.exp(probability[children]).sum())
                v = probability[children] * tau / wanted
                probability[children] = v - np.logaddexp.reduce(v) + held
        out.append(dataclasses.replace(record, log_prob=probability))
    return out


def reliability(records: Iterable[TreeRecord]) -> list[dict[str, float]]:
    """Nodes by their estimated probability, of families whose parent was reached.

    Returns:
      BINS rows: low and high end of the bin, nodes, mean estimate and share that was
      accepted (both 0 without nodes).
    """
    estimates, outcomes = [], []
    for record in records:
        for children, right in record.families():
            estimates.append(np.exp(record.log_prob[children]))
            outcomes.append(children == right)
    estimate = np.concatenate([*estimates, np.zeros(0)])
    outcome = np.concatenate([*outcomes, np.zeros(0)])
    bin_of = np.minimum((estimate * BINS).astype(int), BINS - 1)
    rows = []
    for number in range(BINS):
        inside = bin_of == number
        count = int(inside.sum())
        rows.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "nodes": count,
                "estimated": float(estimate[inside].mean()) if count else 0.0,
                "realised": float(outcome[inside].mean()) if count else 0.0,
            }
        )
    return rows


def merged(tables: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """What `reliability` would give for the records of several calls together."""
    rows = []
    for same in zip(*tables, strict=True):
        nodes = sum(row["nodes"] for row in same)
        means = {
            name: sum(row["nodes"] * row[name] for row in same) / nodes
            if nodes
            else 0.0
            for name in ("estimated", "realised")
        }
        rows.append({**same[0], "nodes": nodes, **means})
    return rows


def error(rows: Sequence[dict[str, float]]) -> float:
    """Mean gap between estimate and outcome, weighted by nodes."""
    nodes = sum(row["nodes"] for row in rows)
    gaps = sum(row["nodes"] * abs(row["estimated"] - row["realised"]) for row in rows)
    return gaps / nodes if nodes else 0.0


def fit_tau(records: Iterable[TreeRecord], tau: float) -> tuple[float, int]:
    """The likeliest tau for the children that turned out right.

    Maximises the likelihood of the accepted child among its siblings under
    softmax(v / tau), over families of two or more that had one. The logarithm of that
    is concave in 1 / tau, so that its slope has one root, found by bisection.

    Args:
      records: of trees of two or more siblings.
      tau: under which they were taken.

    Returns:
      tau, and the number of families that it was fitted on; it ends at 0.02 or 50 where
      they have no interior best.

    Raises:
      ValueError: no family to fit on.
    """
    scores, rights = [], []
    for record in records:
        for children, right in record.families():
            if right is not None and len(children) > 1:
                v = tau * record.log_prob[children].astype(float)
                scores.append(v - v.max())
                rights.append(int(np.flatnonzero(children == right)[0]))
    if not scores:
        raise ValueError("no family of two or more siblings had a right one")
    widest = max(len(v) for v in scores)
    v_NK = np.full((len(scores), widest), -np.inf)
    for row, v in zip(v_NK, scores, strict=True):
        row[: len(v)] = v
    chosen = sum(v[right] for v, right in zip(scores, rights, strict=True))
    finite = np.where(v_NK > -np.inf, v_NK, 0.0)

    def slope(inverse: float) -> float:
        weights = np.exp(v_NK * inverse)
        return chosen - float(((weights * finite).sum(1) / weights.sum(1)).sum())

    low, high = 1 / _RANGE[1], 1 / _RANGE[0]
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(1 / np.sqrt(low * high)), len(scores)
