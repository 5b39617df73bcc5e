"""Tree attention in float64 numpy, row by row, and random cases for it."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.tree_attention import Operands


def cast(case: Operands, dtype=np.float32) -> Operands:
    """The same case with numbers rounded to `dtype`."""
    given = ((name, getattr(case, name)) for name in ("queries", "kv_pages", "tree_kv"))
    numbers = {name: x.astype(dtype) for name, x in given if x is not None}
    return dataclasses.replace(case, **numbers)


def random_tree(rng, nodes: int):
    """Parents (a parent before its child), ancestors [U, U] and depths [U]."""
    parents = [-1] + [int(rng.integers(0, node)) for node in range(1, nodes)]
    ancestors = np.eye(nodes, dtype=bool)
    depth = np.zeros(nodes, np.int32)
    for node, parent in enumerate(parents[1:], 1):
        ancestors[node] |= ancestors[parent]
        depth[node] = depth[parent] + 1
    return parents, ancestors, depth


def make_case(
    rng, *, B, T, G, page, lengths, K=2, H=8, scratch=0, max_pages=10
) -> Operands:
    """A random tree per slot over a prefix scattered over shuffled pages, float64.

    Pages that hold no row of any slot are there too, page 0 (trash) among them.
    """
    U, P = T + scratch, B * max_pages + 3
    trees = [random_tree(rng, U) for _ in range(B)]
    table = rng.permutation(np.arange(1, P))[: B * max_pages].reshape(B, max_pages)
    return Operands(
        queries=rng.normal(size=(B, T, K * G, H)),
        kv_pages=rng.normal(size=(P, K, 2, page, H)),
        page_table=table.astype(np.int32),
        lengths=np.asarray(lengths, np.int32),
        tree_kv=rng.normal(size=(B, K, 2, U, H)),
        tree_mask=np.stack([ancestors[scratch:] for _, ancestors, _ in trees]),
        tree_depth=np.stack([depth for _, _, depth in trees]),
    )


def poison(case: Operands) -> Operands:
    """NaN in every row of every page that no slot's prefix holds."""
    pages = case.kv_pages.copy()
    size = pages.shape[3]
    used = np.zeros((pages.shape[0], size), bool)
    for b, length in enumerate(case.lengths):
        at = np.arange(length)
        used[case.page_table[b, at // size], at % size] = True
    assert not used.all()
    page, row = np.nonzero(~used)
    pages[page, :, :, row] = np.nan
    return dataclasses.replace(case, kv_pages=pages)


def attention(case: Operands, *, scale, window=None, soft_cap=None) -> np.ndarray:
    """The contract, one query at a time."""
    B, T, N, H, K, _, U = case.dims
    out = np.zeros((B, T, N, H))
    for b in range(B):
        length = int(case.lengths[b]) if case.has_prefix else 0
        for t in range(T):
            depth = int(case.tree_depth[b, U - T + t])
            for n in range(N):
                head = n // (N // K)
                keys, values = [], []
                for at in range(length):
                    if window is not None and length + depth - at >= window:
                        continue
                    size = case.kv_pages.shape[3]
                    rows = case.kv_pages[case.page_table[b, at // size], head]
                    keys.append(rows[0, at % size])
                    values.append(rows[1, at % size])
                for u in range(U):
                    apart = depth - int(case.tree_depth[b, u])
                    if not case.tree_mask[b, t, u]:
                        continue
                    if window is not None and apart >= window:
                        continue
                    keys.append(case.tree_kv[b, head, 0, u])
                    values.append(case.tree_kv[b, head, 1, u])
                if not keys:
                    continue
                query = case.queries[b, t, n].astype(np.float64)
                scores = np.asarray(keys, np.float64) @ query * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ np.asarray(values, np.float64)
    return out
