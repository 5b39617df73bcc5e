"""Tree attention in float64 numpy, row by row, and random cases for it."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Case:
    """Arguments of one call, as numpy arrays (names as in `tree_attention`)."""

    q: np.ndarray
    kv_pages: np.ndarray | None
    page_table: np.ndarray | None
    lengths: np.ndarray | None
    tree_kv: np.ndarray
    tree_mask: np.ndarray
    tree_depth: np.ndarray

    def arrays(self, dtype=np.float32) -> tuple:
        """Positional arguments, numbers cast to `dtype`."""
        pages = None if self.kv_pages is None else self.kv_pages.astype(dtype)
        return (
            self.q.astype(dtype),
            pages,
            self.page_table,
            self.lengths,
            self.tree_kv.astype(dtype),
            self.tree_mask,
        )

    def cast(self, dtype) -> Case:
        """The same case with numbers rounded to `dtype`."""
        q, pages, _, _, tree_kv, _ = self.arrays(dtype)
        return dataclasses.replace(self, q=q, kv_pages=pages, tree_kv=tree_kv)


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
) -> Case:
    """A random tree per slot over a prefix scattered over shuffled pages.

    Pages that hold no row of any slot are there too, page 0 (trash) among them.
    """
    U, P = T + scratch, B * max_pages + 3
    trees = [random_tree(rng, U) for _ in range(B)]
    table = rng.permutation(np.arange(1, P))[: B * max_pages].reshape(B, max_pages)
    return Case(
        q=rng.normal(size=(B, T, K * G, H)),
        kv_pages=rng.normal(size=(P, K, 2, page, H)),
        page_table=table.astype(np.int32),
        lengths=np.asarray(lengths, np.int32),
        tree_kv=rng.normal(size=(B, K, 2, U, H)),
        tree_mask=np.stack([ancestors[scratch:] for _, ancestors, _ in trees]),
        tree_depth=np.stack([depth for _, _, depth in trees]),
    )


def poison(case: Case) -> Case:
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


def attention(case: Case, *, scale, window=None, soft_cap=None) -> np.ndarray:
    """The contract, one query at a time."""
    B, T, N, H = case.q.shape
    K, U = case.tree_kv.shape[1], case.tree_kv.shape[3]
    out = np.zeros((B, T, N, H))
    for b in range(B):
        length = int(case.lengths[b]) if case.kv_pages is not None else 0
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
                query = case.q[b, t, n].astype(np.float64)
                scores = np.asarray(keys, np.float64) @ query * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ np.asarray(values, np.float64)
    return out
