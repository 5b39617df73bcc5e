"""The public operation: checks its arguments, then picks an implementation.

Letters: B slots, T new tree rows, U = E + T tree rows in all (E of earlier calls
first), N query heads, K key/value heads, H head width, P pages.
"""

from __future__ import annotations

import jax

from pallas_kernels.tree_attention import reference

IMPLEMENTATIONS = ("reference",)


def tree_attention(
    q: jax.Array,
    kv_pages: jax.Array | None,
    page_table: jax.Array | None,
    lengths: jax.Array | None,
    tree_kv: jax.Array,
    tree_mask: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tree_depth: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over (prefix rows 0..length-1) and the allowed tree rows.

    Args:
      q: [B, T, N, H], rotary applied.
      kv_pages: [P, K, 2, page, H]; None: there is no prefix.
      page_table: int32 [B, max_pages]; entries past a slot's length are read and
        masked, so they must name some page.
      lengths: int32 [B], rows of prefix per slot.
      tree_kv: [B, K, 2, U, H]; the last T of the U rows are this call's own.
      tree_mask: bool [B, T, U], ancestors, self included; the only mask.
      scale: multiplies the scores.
      window: a row sees the `window` newest positions only, itself included; in the
        tree, positions go by depth.
      soft_cap: scores become cap · tanh(score / cap).
      tree_depth: int32 [B, U], needed with `window`.
      implementation: a name of `IMPLEMENTATIONS`, or None to choose by platform.

    Returns:
      [B, T, N, H] in the dtype of `q`, computed in float32. A row that may see nothing
      is zeros.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"tree_attention has no implementation {implementation!r}; choose from "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    _validate(q, kv_pages, page_table, lengths, tree_kv, tree_mask)
    if window is not None:
        if tree_depth is None:
            raise ValueError(f"window={window} needs tree_depth [B, U]")
        want = q.shape[0], tree_kv.shape[3]
        if tree_depth.shape != want:
            raise ValueError(f"tree_depth is {tree_depth.shape}, want {want}")
    return reference.tree_attention(
        q,
        kv_pages,
        page_table,
        lengths,
        tree_kv,
        tree_mask,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        tree_depth=tree_depth,
    )


def _validate(q, kv_pages, page_table, lengths, tree_kv, tree_mask):
    if q.ndim != 4:
        raise ValueError(f"q is {q.shape}, want [B, T, N, H]")
    B, T, N, H = q.shape
    K, U = (tree_kv.shape[1], tree_kv.shape[3]) if tree_kv.ndim == 5 else (1, 0)
    if tree_kv.shape != (B, K, 2, U, H) or N % K or U < T:
        raise ValueError(
            f"tree_kv {tree_kv.shape} does not fit q {q.shape}: want "
            "[B, K, 2, U >= T, H] with K dividing N"
        )
    if tree_mask.shape != (B, T, U):
        raise ValueError(f"tree_mask is {tree_mask.shape}, want {(B, T, U)}")
    if kv_pages is None:
        return
    if kv_pages.ndim != 5 or kv_pages.shape[1:3] != (K, 2) or kv_pages.shape[4] != H:
        raise ValueError(f"kv_pages is {kv_pages.shape}, want [P, {K}, 2, page, {H}]")
    table, length = (x if x is None else x.shape for x in (page_table, lengths))
    if table is None or len(table) != 2 or table[0] != B or length != (B,):
        raise ValueError(
            f"page_table {table} and lengths {length} must be "
            f"[{B}, max_pages] and [{B}]"
        )
