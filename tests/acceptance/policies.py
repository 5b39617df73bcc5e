"""Cascades by the papers' words, token by token."""

from __future__ import annotations

import numpy as np


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


def greedy_token(name, alpha, p, q):
    """The drafter's likeliest token, or the target's where that is deferred."""
    own = int(np.argmax(q))
    distance = 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
    bar = max(p) - alpha
    defers = {
        "chow": max(q) < 1 - alpha,
        "diff": max(q) < bar,
        "opt": max(q) < max(p) - alpha * distance,
        "token_v1": q[own] < bar,
        "token_v2": p[own] < bar,
        "token_v3": p[own] < (1 - alpha) * max(p),
    }[name]
    return int(np.argmax(p)) if defers else own
