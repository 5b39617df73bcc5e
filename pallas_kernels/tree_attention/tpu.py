"""Tree attention as one Mosaic kernel.

All R = T * G query rows of a (slot, key/value head) stand as one operand, which the
kernel gathers from [T, N, H] itself, and scatters the output likewise. The prefix is
walked in blocks of whole pages, copied by hand into a ring of buffers that runs ahead
over the ends of slots, so that the memory never waits for a slot's last product; blocks
that hold only visible rows need no mask and go first, the partly visible ones follow,
the tree is the last block.

Letters as in `operands`; S rows of a block, R query rows of a tile of the grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.quantized import rescale
from pallas_kernels.tree_attention.ring import Plan, Ring
from pallas_kernels.tree_attention.sizes import LANES, BlockSizes
from pallas_kernels.tree_attention.spec import AttentionSpec

# Below every score and yet finite: exp2(LOWEST - LOWEST) is 1, not NaN.
LOWEST = -1e38
# A contraction that yields a [rows, keys] product of two row-major operands.
CONTRACT_LAST = (((1,), (1,)), ((), ()))
CONTRACT_INNER = (((1,), (0,)), ((), ()))


# Of the 1 MiB of scalar memory.
SMEM_TABLE_BYTES = 512 * 2**10
# Tree rows of one product; more take several.
TREE_BLOCK = 256
# T rows that are rearranged at a time: whole tiles of bf16, whatever G is.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel's code depends on."""

    sizes: BlockSizes
    scale: float
    soft_cap: float | None
    windowed: bool
    quantized: bool
    prefix: bool
    slots: int
    K: int
    G: int
    H: int  # Width of a row in memory, whole lanes,
    width: int  # and of a row of `q` and `tree_kv`.
    parts: int  # 2: keys and values; 1: a value lies behind its key.
    page: int
    pages_per_block: int
    max_pages: int
    scale_width: int
    tree_rows: int
    U: int  # The same, padding included.
    tree_block: int
    heads: int  # Of one grid step.
    unroll: int
    head_steps: int
    step_rows: int  # T rows of one grid step,
    mask_rows: int  # padding included,
    rows: int  # and its query rows per head, padding included.
    row_steps: int
    page_bytes: int  # Of one number in a page,
    row_bytes: int  # and of one in `q`.

    @property
    def tile(self) -> int:
        return min(self.sizes.rows, self.rows)

    @property
    def pads_tree(self) -> bool:
        return self.tree_rows < self.U or self.width < self.H

    @property
    def value_lanes(self) -> slice:
        """Where a value lies in its row, and so an output."""
        first = self.width if self.parts == 1 else 0
        return slice(first, first + self.width)

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.row_bytes == 4 else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what lies in vector memory, but for the windows of inputs and outputs."""
        shapes = {
            "top": (self.heads, self.rows, LANES),
            "total": (self.heads, self.rows, LANES),
            "acc": (self.heads, self.rows, self.H),
            "rows": (self.heads, self.rows, self.H),
            "seen": (self.tile, self.U),
            "scored": (self.unroll, self.tile, self.block_columns()),
        }
        if self.pads_tree:
            shapes["tree"] = (self.heads, 2, self.U, self.H)
        ring = (self.sizes.buffers, self.pages_per_block, self.heads)
        if self.prefix:
            shapes["buffer"] = (*ring, self.parts, self.page, self.H)
        if self.quantized:
            shapes["scales"] = (*ring, 2, self.scale_width)
        return shapes

    def scratch(self, operands: Operands) -> list:
        shapes = self.shapes()
        types = dict.fromkeys(("rows", "tree"), operands.queries)
        types |= {"buffer": operands.kv_pages, "scales": operands.kv_scales}
        scratch = [
            pltpu.VMEM(shape, types[name].dtype if name in types else jnp.float32)
            for name, shape in shapes.items()
        ]
        if self.prefix:
            scratch += [
                pltpu.SemaphoreType.DMA((self.sizes.buffers,)),
                pltpu.SMEM((5,), jnp.int32),
            ]
        return scratch

    def vmem_bytes(self) -> int:
        """An estimate from above; two of each window are there."""
        size = {name: math.prod(shape) * 4 for name, shape in self.shapes().items()}
        size["seen"] = self.tile * _round_up(self.U, LANES) * 4
        for name in ("rows", "tree"):
            size[name] = size.get(name, 0) // 4 * self.row_bytes
        if self.prefix:
            size["buffer"] = size["buffer"] // 4 * self.page_bytes
        queries = self.step_rows * _round_up(self.heads * self.G, 16)
        rows = (2 * queries + 2 * self.heads * self.U) * self.H * self.row_bytes
        mask = self.mask_rows * _round_up(self.U, LANES) * 2
        limit = self.rows * LANES * 4 if self.windowed else 0
        return sum(size.values()) + 2 * (rows + mask + limit) + 2**20

    def block_columns(self) -> int:
        """Of the widest block of scores, whole lanes."""
        widest = max(self.tree_block, self.page * self.pages_per_block)
        return _round_up(widest, LANES)


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

    def __init__(self, static, q, top, total, out, scored):
        self.static, self.scored = static, scored
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
            columns = [slice(c, min(c + LANES, S)) for c in range(0, S, LANES)]
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


def _kernel(static: Static, *refs):
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
    softmax = _Softmax(static, q, top, total, acc, scored)
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

        def full_block(index, _):
            entry, _ = ring.wait(slot, step, index, full=True)
            ring.start()

            def body(heads, span):
                softmax.add(
                    heads,
                    span,
                    lambda h: softmax.scores(
                        h, span, rows_of(entry, h, 0), scale_of(entry, h, 0)
                    ),
                    lambda h: rows_of(entry, h, 1),
                    lambda h: scale_of(entry, h, 1),
                )

            each_tile(body)

        def partial_block(index, _):
            entry, first_page = ring.wait(slot, step, index, full=False)
            ring.start()
            start = first_page * static.page
            end = plan[Plan.LENGTH, slot]

            def scores(h, span):
                s = softmax.scores(h, span, rows_of(entry, h, 0), scale_of(entry, h, 0))
                key_position = start + lax.broadcasted_iota(jnp.int32, s.shape, 1)
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
                softmax.add(
                    heads,
                    span,
                    lambda h: scores(h, span),
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


def _round_up(x, to):
    return -(-x // to) * to


def _divisors(n):
    return [d for d in range(n, 0, -1) if n % d == 0]


def cut(operands: Operands, spec: AttentionSpec) -> Static | str:
    """Fits the block sizes to a call; the heads per step follow the memory.

    Returns:
      The static description, or a sentence on why this kernel cannot take the call.
    """
    B, T, _, H, K, G, U = operands.dims
    kv_pages, kv_scales = operands.kv_pages, operands.kv_scales
    prefix, sizes = operands.has_prefix, spec.block_sizes
    page, max_pages = operands.page, operands.max_pages
    width = kv_pages.shape[4] if prefix else H
    reason = operands.unsupported_types((jnp.bfloat16, jnp.float32))
    if reason is not None:
        return reason
    if width % LANES:
        # XLA keeps such arrays transposed, and would copy all pages before every call.
        return (
            f"rows of {width} numbers are not whole lanes: make kv_pages "
            f"{_round_up(H, LANES)} wide, the rest zeros"
        )
    if prefix:
        if page % 16:
            return f"pages of {page} rows are not multiples of 16"
        if operands.is_quantized and kv_scales.shape[3] % LANES:
            return (
                f"scales of {kv_scales.shape[3]} rows are not whole lanes: make "
                f"kv_scales {_round_up(page, LANES)} wide"
            )
        if B * max_pages * 4 > SMEM_TABLE_BYTES:
            return (
                f"a page table of {B} x {max_pages} is more than {SMEM_TABLE_BYTES} "
                "bytes"
            )

    pages_per_block = min(max(1, sizes.block_rows // page), max_pages) if prefix else 0
    tree_block = U_padded = _round_up(U, 16)
    if U_padded > TREE_BLOCK:
        tree_block, U_padded = TREE_BLOCK, _round_up(U, TREE_BLOCK)
    # A step's query heads are whole tiles of `q`, or all.
    whole = [d for d in _divisors(K) if d * G % 8 == 0 or d == K]
    head_counts = [d for d in whole if d <= sizes.heads] or whole[-1:]
    max_rows = sizes.max_rows
    while True:
        row_steps, step_rows = 1, T
        if max_rows < T * G:
            step_rows = max(16, max_rows // G // 16 * 16)
            row_steps = pl.cdiv(T, step_rows)
        rows = step_rows * G
        rows = 8 if rows <= 8 else _round_up(rows, 16)
        if rows > sizes.rows:
            rows = _round_up(rows, sizes.rows)
        for heads in head_counts:
            static = Static(
                sizes=sizes,
                K=K,
                G=G,
                H=width,
                width=H,
                parts=1 if operands.is_joined else 2,
                page=page,
                pages_per_block=pages_per_block,
                max_pages=max_pages,
                slots=B,
                heads=heads,
                unroll=next(d for d in _divisors(heads) if d <= sizes.unroll),
                rows=rows,
                step_rows=step_rows,
                mask_rows=_round_up(step_rows, 16),
                tree_rows=U,
                U=U_padded,
                tree_block=tree_block,
                head_steps=K // heads,
                row_steps=row_steps,
                quantized=operands.is_quantized,
                scale_width=kv_scales.shape[3] if operands.is_quantized else 0,
                prefix=prefix,
                page_bytes=kv_pages.dtype.itemsize if prefix else 0,
                row_bytes=operands.queries.dtype.itemsize,
                scale=spec.scale,
                soft_cap=spec.soft_cap,
                windowed=prefix and spec.window is not None,
            )
            if static.vmem_bytes() <= sizes.vmem_bytes:
                return static
        if max_rows > sizes.rows:
            max_rows //= 2
        elif pages_per_block > 1:
            pages_per_block //= 2
        else:
            return f"one block needs {static.vmem_bytes()} of {sizes.vmem_bytes} bytes"


def unsupported(operands: Operands, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot take such a call, in a sentence; None: it can."""
    static = cut(operands, spec)
    return static if isinstance(static, str) else None


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """See `api.tree_attention`.

    Args:
      operands: the arrays.
      spec: the settings, block sizes of this kernel among them.
    """
    B, T, N, H, K, G, U = operands.dims
    q, tree_kv, lengths = operands.queries, operands.tree_kv, operands.lengths
    static, window = cut(operands, spec), spec.window
    assert isinstance(static, Static), static

    def tiles(x, size, padded, axis):
        """Cuts an axis into the steps' pieces of `size`, each padded with zeros."""
        steps = static.row_steps
        x = _pad(x, axis, steps * size)
        x = x.reshape(x.shape[:axis] + (steps, size) + x.shape[axis + 1 :])
        x = _pad(x, axis + 1, padded)
        return x.reshape(x.shape[:axis] + (steps * padded,) + x.shape[axis + 2 :])

    allowed = operands.tree_mask
    if window is not None:
        depth_BU = operands.tree_depth
        depth_BT = depth_BU[:, U - T :]
        allowed &= depth_BT[:, :, None] - depth_BU[:, None, :] < window
    mask = tiles(allowed.astype(jnp.bfloat16), static.step_rows, static.mask_rows, 1)
    mask = _pad(mask, 2, static.U)

    vmem = functools.partial(pl.BlockSpec, memory_space=pltpu.VMEM)
    tokens = vmem(
        (1, static.step_rows, static.heads * G, H), lambda b, k, r, *_: (b, r, k, 0)
    )
    prefetch, inputs = [], [q, tree_kv, mask]
    in_specs = [
        tokens,
        vmem(
            (1, static.heads, 2, U, H),
            lambda b, k, r, *_: (b, k, 0, 0, 0),
        ),
        vmem((1, static.mask_rows, static.U), lambda b, k, r, *_: (b, r, 0)),
    ]
    if static.prefix:
        low = high = jnp.zeros_like(lengths)
        if window is not None:
            limit_BT = jnp.maximum(lengths[:, None] + depth_BT - window + 1, 0)
            low, high = jnp.min(limit_BT, axis=1), jnp.max(limit_BT, axis=1)
            limit_BR = jnp.repeat(limit_BT, G, axis=1)
            limit_BR = tiles(limit_BR, static.step_rows * G, static.rows, 1)
            inputs.append(
                jnp.broadcast_to(limit_BR[..., None], (*limit_BR.shape, LANES))
            )
            in_specs.append(
                vmem((1, static.rows, LANES), lambda b, k, r, *_: (b, r, 0))
            )
        prefetch = [
            operands.page_table.reshape(-1),
            Plan.make(lengths, low, high, static.page, static.pages_per_block),
        ]
        for x in (operands.kv_pages, operands.kv_scales):
            if x is not None:
                if not spec.interpret:
                    # Else XLA first fetches whole pools, free pages and all, into
                    # vector memory where they fit there.
                    x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
                inputs.append(x)
                in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    S = static.max_pages * static.page
    row_bytes = operands.prefix_row_bytes(static.H)
    return pl.pallas_call(
        functools.partial(_kernel, static),
        name="tree_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(B, static.head_steps, static.row_steps),
            in_specs=in_specs,
            out_specs=tokens,
            scratch_shapes=static.scratch(operands),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Of slots that are full: how full they are is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * T * (S + U) * H,
            transcendentals=B * N * T * (S + U),
            bytes_accessed=B * S * row_bytes * static.row_steps
            + sum(x.nbytes for x in (tree_kv, q, q, mask)),
        ),
        compiler_params=pltpu.CompilerParams(
            # Steps hand the ring of page buffers on, so their order is fixed.
            dimension_semantics=("arbitrary",) * 3,
            vmem_limit_bytes=static.sizes.vmem_bytes,
        ),
        interpret=spec.interpret,
    )(*prefetch, *inputs)


def _pad(x, axis, size):
    """Pads an axis with zeros to `size`."""
    short = size - x.shape[axis]
    if not short:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])
