"""The program of the TPU kernel: what one step of its grid does.

All R = T * G query rows of a (slot, key/value head) stand as one operand, which the
kernel gathers from [T, N, H] itself, and scatters the output likewise. The prefix is
walked in blocks of whole pages, copied by hand into a ring of buffers that runs ahead
over the ends of slots, so that the memory never waits for a slot's last product; blocks
that hold only visible rows need no mask and go first, the partly visible ones follow,
the tree is the last block.

Letters as in `operands`; S rows of a block, R query rows of a tile of the grid.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tree_attention.quantized import rescale
from pallas_kernels.tree_attention.ring import Plan, Ring
from pallas_kernels.tree_attention.sizes import LANES
from pallas_kernels.tree_attention.tpu_cut import Static

# Below every score and yet finite: exp2(LOWEST - LOWEST) is 1, not NaN.
LOWEST = -1e38
# A contraction that yields a [rows, keys] product of two row-major operands.
CONTRACT_LAST = (((1,), (1,)), ((), ()))
CONTRACT_INNER = (((1,), (0,)), ((), ()))
# Keys whose scores and weights stand beside each other in `_Softmax.add_in_turn`.
PIECE = 256
# T rows that are rearranged at a time: whole tiles of bf16, whatever G is.
CHUNK = 16


def _dot(a, b, dims, static):
    return lax.dot_general(
        a,
        b,
        dims,
        preferred_element_type=jnp.float32,
        precision=static.precision,
    )


class _Softmax:
    """Running softmax of one tile of query rows against blocks of keys."""

    def __init__(self, static, q, top, total, out, scratch):
        self.static = static
        self.scored, self.highest = scratch
        self.q, self.top, self.total, self.out = q, top, total, out

    def reset(self):
        self.top[...] = jnp.full(self.top.shape, LOWEST, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.out[...] = jnp.zeros(self.out.shape, jnp.float32)

    def scores(self, h, span, keys_SH, key_scale=None):
        """Scores in units of log2, float32 [rows, S]."""
        static = self.static
        s = rescale(_dot(self.q[h, span], keys_SH, CONTRACT_LAST, static), key_scale)
        if static.soft_cap is None:
            return s * (static.scale * math.log2(math.e))
        capped = jnp.tanh(s * (static.scale / static.soft_cap))
        return capped * (static.soft_cap * math.log2(math.e))

    def add(self, heads, span, scores, values, value_scale):
        """Adds one block for several heads, side by side: their latencies overlap.

        Scores go through memory, on purpose: there are more than registers hold, and
        the compiler's own choice of what to spill was slower.

        Args:
          heads: of the step.
          span: slice of the step's query rows.
          scores: of a head, [rows, S], -inf where masked.
          values: of a head, [S, H], finite.
          value_scale: of a head, [1, S], or None.
        """
        highest = []
        for u, h in enumerate(heads):
            s_RS = scores(h)
            S = s_RS.shape[1]
            self.scored[u, :, :S] = s_RS
            columns = _columns(slice(0, S))
            highest.append(functools.reduce(jnp.maximum, [s_RS[:, c] for c in columns]))
        for u, h in enumerate(heads):
            top_old = self.top[h, span]
            top = jnp.maximum(top_old, jnp.max(highest[u], axis=1, keepdims=True))
            shrink = jnp.exp2(top_old - top)
            p_RS, sums = self._weights(u, top, columns, value_scale(h))
            self.top[h, span] = top
            self.total[h, span] = self.total[h, span] * shrink + sums
            pv = _dot(p_RS, values(h), CONTRACT_INNER, self.static)
            wide = jnp.concatenate([shrink] * (self.static.H // LANES), axis=1)
            self.out[h, span] = self.out[h, span] * wide + pv

    def add_in_turn(self, heads, span, scores, values, value_scale):
        """As `add`, the scores of each head beside the weights of the one before.

        So the vector units work on one head while the matrix units do on the next. In
        pieces, and the maximum and the output through memory between them: so less is
        in registers at once.

        Args:
          scores: of a head and a slice of the block's keys, as of `add`.
          heads, span, values, value_scale: as of `add`.
        """
        S = self.static.page * self.static.pages_per_block
        pieces = [slice(c, min(c + PIECE, S)) for c in range(0, S, PIECE)]
        for u in range(len(heads) + 1):
            if u:
                h = heads[u - 1]
                self._raise(u - 1, h, span)
            for piece in pieces:
                if u < len(heads):
                    self._score(u, piece, scores(heads[u], piece))
                if u:
                    columns = _columns(piece)
                    top, scale = self.top[h, span], value_scale(h)
                    p_RS, sums = self._weights(u - 1, top, columns, scale)
                    self.total[h, span] = self.total[h, span] + sums
                    pv = _dot(p_RS, values(h)[piece], CONTRACT_INNER, self.static)
                    self.out[h, span] = self.out[h, span] + pv

    def _score(self, u, piece, s_RS):
        """Keeps the scores of a piece, and their maximum lane by lane."""
        self.scored[u, :, piece] = s_RS
        parts = [s_RS[:, c] for c in _columns(slice(0, s_RS.shape[1]))]
        highest = functools.reduce(jnp.maximum, parts)
        before = [self.highest[u]] if piece.start else []
        self.highest[u] = functools.reduce(jnp.maximum, [highest, *before])

    def _raise(self, u, h, span):
        """Takes a block's maximum into account in what is added up already."""
        top_old = self.top[h, span]
        highest = jnp.max(self.highest[u], axis=1, keepdims=True)
        top = jnp.maximum(top_old, highest)
        shrink = jnp.exp2(top_old - top)
        self.top[h, span] = top
        self.total[h, span] = self.total[h, span] * shrink
        wide = jnp.concatenate([shrink] * (self.static.H // LANES), axis=1)
        self.out[h, span] = self.out[h, span] * wide

    def _weights(self, u, top, columns, value_scale):
        """exp2(scores - top), scaled and rounded, and its sums lane by lane."""
        p = [
            jnp.exp2(self.scored[u, :, c] - top[:, : c.stop - c.start]) for c in columns
        ]
        # The lanes are added up once, at the very end.
        total = functools.reduce(jnp.add, p)
        short = LANES - total.shape[1]
        if short:
            zeros = jnp.zeros((total.shape[0], short), jnp.float32)
            total = jnp.concatenate([total, zeros], axis=1)
        if value_scale is not None:
            p = [x * value_scale[:, c] for x, c in zip(p, columns, strict=True)]
        return jnp.concatenate(p, axis=1).astype(self.q.dtype), total

    def result(self, h, span):
        total = jnp.sum(self.total[h, span], axis=1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        return self.out[h, span] * jnp.where(total > 0, 1.0 / safe, 0.0)


def _columns(span):
    """The lanes of a slice of keys, a register's width at a time."""
    return [
        slice(c, min(c + LANES, span.stop)) for c in range(span.start, span.stop, LANES)
    ]


def kernel(static: Static, *refs):
    refs = list(refs)

    def take(wanted=True):
        return refs.pop(0) if wanted else None

    prefix, quantized = static.prefix, static.quantized
    # Prefetch
    table = take(prefix)  # [B * max_pages]
    plan = take(prefix)  # [8, B]
    # Inputs
    q_tokens = take()  # [1, step_rows, heads * G, width]
    tree_kv = take().at[0]  # [heads, 2, tree_rows, width]
    tree_mask = take()  # [1, mask_rows, U]
    limit = take(static.windowed)  # [1, rows, LANES]
    pages = take(prefix)  # [P, K, parts, page, H] in HBM
    scales = take(quantized)  # [P, K, 2, page] in HBM
    # Outputs
    out = take()  # [1, step_rows, heads * G, width]
    # Scratch
    top = take()  # [heads, rows, LANES]
    total = take()  # [heads, rows, LANES]
    acc = take()  # [heads, rows, H]
    q = take()  # [heads, rows, H]
    seen = take()  # [tile, U]
    scored = take()  # [unroll, tile, S or U]
    highest = take(static.in_turn)  # [unroll, tile, LANES]
    tree = take() if static.pads_tree else tree_kv  # [heads, 2, U, H]
    buffer = take(prefix)  # [buffers, pages_per_block, heads, parts, page, H]
    scale_buffer = take(quantized)  # [buffers, pages_per_block, heads, 2, page]
    sem = take(prefix)  # [buffers]
    state = take(prefix)  # [5]

    tile = static.tile
    tiles = static.rows // tile
    unroll = static.unroll
    slot = pl.program_id(0)
    step = pl.program_id(1) * static.row_steps + pl.program_id(2)
    softmax = _Softmax(static, q, top, total, acc, (scored, highest))
    softmax.reset()
    _gather(static, q_tokens, q)
    if static.pads_tree:
        tree[...] = jnp.zeros(tree.shape, tree.dtype)
        tree[:, 0, : static.tree_rows, : static.width] = tree_kv[:, 0]
        tree[:, 1, : static.tree_rows, static.value_lanes] = tree_kv[:, 1]

    def each_tile(body):
        """Calls body(head, rows) for all heads and tiles, `unroll` heads at a time."""

        def some(i, _):
            span = pl.ds(pl.multiple_of(lax.rem(i, tiles) * tile, tile), tile)
            if tiles == 1:
                span = slice(None)
            first = lax.div(i, tiles) * unroll
            body([first + u for u in range(unroll)], span)

        n = static.heads // unroll * tiles
        if n == 1:
            body(list(range(unroll)), slice(None))
        else:
            lax.fori_loop(0, n, some, None)

    if prefix:
        ring = Ring(
            static, table, plan, pages, scales, buffer, scale_buffer, sem, state
        )
        S = static.page * static.pages_per_block
        add = softmax.add_in_turn if static.in_turn else softmax.add

        @pl.when((slot == 0) & (step == 0))
        def _():
            ring.begin()

        def rows_of(entry, h, which):
            part = which * (static.parts - 1)
            rows = buffer[entry, :, h, part].reshape(S, static.H)
            return rows.astype(q.dtype) if quantized else rows

        def scale_of(entry, h, which):
            if not quantized:
                return None
            return jnp.concatenate(
                [
                    scale_buffer[entry, j, h, which : which + 1][:, : static.page]
                    for j in range(static.pages_per_block)
                ],
                axis=1,
            )

        def scores(entry, h, span, piece):
            scale = scale_of(entry, h, 0)
            scale = None if scale is None else scale[:, piece]
            return softmax.scores(h, span, rows_of(entry, h, 0)[piece], scale)

        whole = slice(0, S)

        def full_block(index, _):
            entry, _ = ring.wait(slot, step, index, full=True)
            ring.start()

            def body(heads, span):
                add(
                    heads,
                    span,
                    lambda h, piece=whole: scores(entry, h, span, piece),
                    lambda h: rows_of(entry, h, 1),
                    lambda h: scale_of(entry, h, 1),
                )

            each_tile(body)

        def partial_block(index, _):
            entry, first_page = ring.wait(slot, step, index, full=False)
            ring.start()
            start = first_page * static.page
            end = plan[Plan.LENGTH, slot]

            def visible_scores(h, span, piece):
                s = scores(entry, h, span, piece)
                key_position = lax.broadcasted_iota(jnp.int32, s.shape, 1)
                key_position += start + piece.start
                visible = key_position < end
                if static.windowed:
                    visible &= key_position >= limit[0, span][:, :1]
                return jnp.where(visible, s, -jnp.inf)

            # Rows that nobody wrote may hold anything; 0 * NaN must not get in.
            def clear(j, _):
                page_row = lax.broadcasted_iota(jnp.int32, (static.page, static.H), 0)
                written = page_row < end - start - j * static.page
                for h in range(static.heads):
                    last = static.parts - 1
                    values = buffer[entry, j, h, last]
                    zeros = jnp.zeros_like(values)
                    buffer[entry, j, h, last] = jnp.where(written, values, zeros)

            written_pages = lax.div(end - start, static.page)
            lax.fori_loop(written_pages, static.pages_per_block, clear, None)

            def value_scale(h):
                scale = scale_of(entry, h, 1)
                if scale is None:
                    return None
                written = start + lax.broadcasted_iota(jnp.int32, (1, S), 1) < end
                return jnp.where(written, scale, 0.0)

            def body(heads, span):
                add(
                    heads,
                    span,
                    lambda h, piece=whole: visible_scores(h, span, piece),
                    lambda h: rows_of(entry, h, 1),
                    value_scale,
                )

            each_tile(body)

        full = plan[Plan.FULL, slot]
        lax.fori_loop(0, full, full_block, None)
        lax.fori_loop(full, ring.blocks(slot), partial_block, None)

    def tree_tile(r, _):
        span = pl.ds(pl.multiple_of(r * tile, tile), tile) if tiles > 1 else slice(None)
        seen[...] = _expand_mask(static, tree_mask[0], r * tile, tile)

        # Many rows are work enough; more heads would only want more registers.
        side_by_side = unroll if tile <= 32 else 1

        def heads(i, _):
            group = [i * side_by_side + u for u in range(side_by_side)]
            for c in range(0, static.U, static.tree_block):
                cols = slice(c, c + static.tree_block)
                softmax.add(
                    group,
                    span,
                    lambda h, cols=cols: jnp.where(
                        seen[:, cols] > 0.5,
                        softmax.scores(h, span, tree[h, 0, cols]),
                        -jnp.inf,
                    ),
                    lambda h, cols=cols: tree[h, 1, cols],
                    lambda h: None,
                )
            for h in group:
                acc[h, span] = softmax.result(h, span)

        n = static.heads // side_by_side
        heads(0, None) if n == 1 else lax.fori_loop(0, n, heads, None)

    tree_tile(0, None) if tiles == 1 else lax.fori_loop(0, tiles, tree_tile, None)
    _scatter(static, acc, out)


def _each_chunk(static, body):
    """Calls body(first, count) for the step's T rows, some at a time."""
    whole, rest = divmod(static.step_rows, CHUNK)
    if whole == 1:
        body(0, CHUNK)
    elif whole:

        def some(i, _):
            body(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)

        lax.fori_loop(0, whole, some, None)
    if rest:
        body(whole * CHUNK, rest)


def _gather(static, tokens, rows):
    """Heads before rows: XLA's own transposition costs several times as much."""
    G, width = static.G, static.width
    if width < static.H:
        rows[...] = jnp.zeros(rows.shape, rows.dtype)

    def some(t, n):
        for h in range(static.heads):
            x = tokens[0, pl.ds(t, n), h * G : (h + 1) * G].reshape(n * G, width)
            rows[h, pl.ds(t * G, n * G), :width] = x

    _each_chunk(static, some)


def _scatter(static, rows, tokens):
    """The way back, with rounding."""
    G, width = static.G, static.width

    def some(t, n):
        for h in range(static.heads):
            x = rows[h, pl.ds(t * G, n * G), static.value_lanes].reshape(n, G, width)
            tokens[0, pl.ds(t, n), h * G : (h + 1) * G] = x.astype(tokens.dtype)

    _each_chunk(static, some)


def _expand_mask(static, mask_TU, first_row, tile):
    """Repeats each mask row for its G query rows: a product with a 0/1 matrix."""
    shape = (tile, mask_TU.shape[0])
    row = first_row + lax.broadcasted_iota(jnp.int32, shape, 0)
    first = lax.broadcasted_iota(jnp.int32, shape, 1) * static.G
    picks = ((row >= first) & (row < first + static.G)).astype(jnp.float32)
    return lax.dot_general(
        picks.astype(mask_TU.dtype),
        mask_TU,
        CONTRACT_INNER,
        preferred_element_type=jnp.float32,
    )
