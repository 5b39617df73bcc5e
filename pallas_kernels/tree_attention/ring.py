"""What the TPU kernel reads of the prefix, and in which order.

`Plan` lists it per slot, as scalars that are there before the kernel starts; `Ring`
copies it, block by block, ahead of the products.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Plan:
    """Rows of the prefetched int32 table [ROWS, B] of what each slot reads."""

    FIRST_PAGE, END_PAGE, HEAD, FULL, PARTIAL, NEXT, START, LENGTH = range(8)

    @staticmethod
    def make(lengths_B, low_B, high_B, page: int, pages_per_block: int):
        """The plan from lengths and bounds of what a slot's rows see.

        Args:
          lengths_B: rows of prefix.
          low_B: the first row that any query sees.
          high_B: the first row that all queries see.
          page: rows per page.
          pages_per_block: pages per block.
        """
        B = lengths_B.shape[0]
        block = page * pages_per_block
        first_page = jnp.minimum(low_B, lengths_B) // page
        start = first_page * page
        end_page = (lengths_B + page - 1) // page
        blocks = (jnp.maximum(lengths_B - start, 0) + block - 1) // block
        head = jnp.minimum(
            (jnp.maximum(high_B - start, 0) + block - 1) // block, blocks
        )
        full_end = jnp.maximum((lengths_B - start) // block, head)
        full = full_end - head
        index = jnp.where(blocks > 0, jnp.arange(B), B)
        here = lax.cummin(index, reverse=True)
        following = jnp.concatenate([here[1:], jnp.full((1,), B)])
        rows = {
            Plan.FIRST_PAGE: first_page,
            Plan.END_PAGE: end_page,
            Plan.HEAD: head,
            Plan.FULL: full,
            Plan.PARTIAL: blocks - full,
            Plan.NEXT: following,
            Plan.START: here,
            Plan.LENGTH: lengths_B,
        }
        rows = [rows[i] for i in range(len(rows))]
        return jnp.stack(rows).astype(jnp.int32)


@dataclasses.dataclass
class Ring:
    """The ring of page buffers and the cursor that fills it ahead of its readers.

    The blocks of all grid steps form one sequence. `state` in SMEM: the cursor's slot,
    step within the slot and block within the step, and the numbers of blocks copied
    and consumed.
    """

    static: Any
    table: Any
    plan: Any
    pages: Any
    scales: Any
    buffer: Any
    scale_buffer: Any
    sem: Any
    state: Any

    SLOT, STEP, BLOCK, COPIED, USED = range(5)

    def blocks(self, slot):
        return self.plan[Plan.FULL, slot] + self.plan[Plan.PARTIAL, slot]

    def first_page(self, slot, index):
        """The first page of the index-th block that a slot reads."""
        full = self.plan[Plan.FULL, slot]
        head = self.plan[Plan.HEAD, slot]
        block = head + index
        if self.static.windowed:
            rest = index - full
            partial = jnp.where(rest < head, rest, full + rest)
            block = jnp.where(index < full, block, partial)
        return self.plan[Plan.FIRST_PAGE, slot] + block * self.static.pages_per_block

    def count(self, slot, first_page):
        return jnp.minimum(
            self.static.pages_per_block, self.plan[Plan.END_PAGE, slot] - first_page
        )

    def copies(self, entry, slot, step, first_page, j):
        """The copies of a block's j-th page into an entry of the ring."""
        static = self.static
        heads = static.heads
        head = pl.ds(lax.div(step, static.row_steps) * heads, heads)
        page = self.table[slot * static.max_pages + first_page + j]
        yield pltpu.make_async_copy(
            self.pages.at[page, head], self.buffer.at[entry, j], self.sem.at[entry]
        )
        if static.quantized:
            yield pltpu.make_async_copy(
                self.scales.at[page, head],
                self.scale_buffer.at[entry, j],
                self.sem.at[entry],
            )

    def start(self):
        """Copies the cursor's block, if there is one, and moves the cursor."""
        static, state = self.static, self.state
        slot = state[self.SLOT]

        @pl.when(slot < static.slots)
        def _():
            step, block = state[self.STEP], state[self.BLOCK]
            entry = lax.rem(state[self.COPIED], static.sizes.buffers)
            first_page = self.first_page(slot, block)

            def copy(j, _):
                for c in self.copies(entry, slot, step, first_page, j):
                    c.start()

            lax.fori_loop(0, self.count(slot, first_page), copy, None)
            last_block = block + 1 == self.blocks(slot)
            steps = static.head_steps * static.row_steps
            last_step = last_block & (step + 1 == steps)
            state[self.COPIED] += 1
            state[self.BLOCK] = jnp.where(last_block, 0, block + 1)
            state[self.STEP] = jnp.where(
                last_step, 0, jnp.where(last_block, step + 1, step)
            )
            state[self.SLOT] = jnp.where(last_step, self.plan[Plan.NEXT, slot], slot)

    def begin(self):
        """At the first grid step: fill all but one of the buffers."""
        for i in range(5):
            self.state[i] = 0
        self.state[self.SLOT] = self.plan[Plan.START, 0]
        lax.fori_loop(0, self.static.sizes.buffers - 1, lambda *_: self.start(), None)

    def wait(self, slot, step, index, full: bool):
        """Waits for the next block; returns its entry and first page."""
        entry = lax.rem(self.state[self.USED], self.static.sizes.buffers)
        first_page = self.first_page(slot, index)
        self.state[self.USED] += 1
        if full:
            # One wait for as many bytes as the copies of all pages have.
            for b in (self.buffer, self.scale_buffer):
                if b is not None:
                    b = b.at[entry]
                    pltpu.make_async_copy(b, b, self.sem.at[entry]).wait()
        else:

            def wait(j, _):
                for c in self.copies(entry, slot, step, first_page, j):
                    c.wait()

            lax.fori_loop(0, self.count(slot, first_page), wait, None)
        return entry, first_page
