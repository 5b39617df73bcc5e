"""Plans of the host as arguments of programs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np

from treespec_jax.cache.prefill import Chunk
from treespec_jax.engine.plan import ChunkPlan, Plan
from treespec_jax.engine.state import Control
from treespec_jax.sampling import policy
from treespec_jax.sampling.penalties import TextSoFar
from treespec_jax.sampling.temperature import Adaptive

# Methods of `Executor` that run a program over all devices, or compile one. They take
# NumPy arrays and plain values: other processes repeat them (`distributed.repeated`).
REPEATED = (
    "reset",
    "prefill",
    "resume",
    "fork",
    "copy_pages",
    "extend",
    "look",
    "go",
    "dispatch",
    "catch_up",
    "compile",
    "compile_behind",
    "set_draft_leaves",
)


def chunk_arguments(chunk: ChunkPlan) -> tuple:
    """Arguments of a prefill behind the state."""
    rows = Chunk(chunk.tokens, chunk.start, chunk.count, chunk.page_table, chunk.top)
    return np.int32(chunk.slot), rows, (chunk.following, chunk.root)


def batched(
    pairs: Sequence[tuple[int, int]], size: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Runs of at most `size` pairs; an empty one if there are none."""
    for first in range(0, max(len(pairs), 1), size):
        yield pairs[first : first + size]


def pair_arrays(pairs: Sequence[tuple[int, int]], size: int) -> tuple:
    """Sources [size], destinations [size] and count of copies."""
    rows = np.zeros((2, size), np.int32)
    if pairs:
        rows[:, : len(pairs)] = np.transpose(pairs)
    return *rows, np.int32(len(pairs))


def variant_of(control: Control) -> Hashable:
    """What decides besides a program's name whether it was compiled."""
    leaves, structure = jax.tree.flatten(control)
    return structure, tuple(np.shape(leaf) for leaf in leaves)


def control_of(plan: Plan, straight: bool) -> Control:
    """What goes with a dispatch.

    Args:
      plan: of it.
      straight: whether its program has no conditionals.
    """
    running, wanted = sorted(plan.slots), plan.want_logprobs
    logprobs = bool(wanted[running or slice(None)].any())
    return Control(
        page_table=plan.page_table,
        limits=plan.limits,
        eos=plan.eos,
        sampling=policy.from_host(plan.sampling, straight, running, logprobs),
        want_logprobs=wanted,
        speculate=plan.speculate,
        max_steps=plan.max_steps,
        level_price=np.float32(plan.level_price),
        top=plan.top,
        text=TextSoFar.of(plan.text) if plan.text is not None else None,
        adaptive=Adaptive(**plan.adaptive) if plan.adaptive is not None else None,
    )
