"""What a step spends its time on, and what verifying T nodes costs.

Every figure comes from compiled loops of several passes, timed in turn with those that
it is compared to, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.acceptance import select
from treespec_jax.cache import pages as paging
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.drafting.draft_model import DraftModel, DraftModelState
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.engine import step as stepping
from treespec_jax.engine.engine import Engine, Request, prefill_plan
from treespec_jax.measurement.timing import in_turn, paired, spread, timed
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.trees.shapes import StaticShape, TreeShape
from treespec_jax.trees.token_tree import static_tree
from treespec_jax.trees.topology import Topology, chain

CURVE_NODES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Median seconds of one step and of its parts, and median shares of the step.

    Attributes:
      step: the whole, as the engine dispatches it.
      target: the target's forward pass over the tree, output head included.
      draft: the drafter's forward passes, output head included.
      target_share: paired with the step of the same round, as all shares.
      draft_share: of the drafter.
      rest_share: choosing children, accepting, both caches' writes, the host.
    """

    step: float
    target: float
    draft: float
    target_share: float
    draft_share: float
    rest_share: float


def warm_up(llm, prompts: Iterable[Sequence[int]]) -> None:
    """Compiles all that these prompts will run, on prompts just long enough for it."""
    config = llm.engine.config
    sizes = {
        size
        for prompt in prompts
        for _, size, _ in prefill_plan(len(prompt) - 1, config.prefill_chunks)
    }
    for size in sorted(sizes):
        length = min(size + 1, config.max_len - 1)
        # Greedy or not is one program.
        params = SamplingParams(max_tokens=1, temperature=1.0, ignore_eos=True)
        llm.generate([[0] * length], params)


def middle_of(llm, prompt: Sequence[int], emitted: Sequence[int]) -> list[int]:
    """The first half of a text, as long as a dispatch still fits behind it."""
    config = llm.engine.config
    room = config.max_len - 1 - config.steps_per_dispatch * (llm.drafter.depth + 1)
    text = [*prompt, *emitted[: len(emitted) // 2]]
    return text[: max(1, room)]


def step_cost(
    engine: Engine,
    target: Transformer,
    shape: TreeShape,
    prefix: Sequence[int],
    params: SamplingParams,
    rounds: int,
) -> StepCost:
    """Times whole steps after a prefix, and the two models' passes alone.

    Args:
      engine: warm, nothing running.
      target: its target.
      shape: of its trees.
      prefix: tokens in front; with those of one dispatch they must fit max_len.
      params: how to sample.
      rounds: measurements of each.
    """
    config = engine.config
    steps = config.steps_per_dispatch
    emitted = []
    # No text may end before the dispatch does.
    longest = steps * (engine.drafter.depth + 1)
    params = dataclasses.replace(params, max_tokens=longest, ignore_eos=True)

    def whole():
        requests = [Request(list(prefix), params) for _ in range(config.max_batch)]
        for request in requests:
            engine.submit(request)
        before = engine.prefill_seconds
        began = time.perf_counter()
        engine.advance()
        prefill = engine.prefill_seconds - before
        seconds = time.perf_counter() - began - prefill
        for request in requests:
            engine.cancel(request)
        emitted.append(len(requests[0].tokens))
        return seconds / max(1, requests[0].stats.steps)

    whole()
    # The middle of what a dispatch sees.
    length = len(prefix) - 1 + emitted[0] // 2
    programs = {
        "step": whole,
        "target": target_passes(target, shape, config, length, steps),
    }
    if engine.drafter.module is not None:
        programs["draft"] = draft_passes(engine.drafter, config, length, steps)
    seconds = in_turn(programs, rounds)
    draft = seconds.get("draft", [0.0] * rounds)
    target_shares = paired(seconds["target"], seconds["step"])
    draft_shares = paired(draft, seconds["step"])
    rest = [1 - t - d for t, d in zip(target_shares, draft_shares, strict=True)]
    return StepCost(
        step=statistics.median(seconds["step"]),
        target=statistics.median(seconds["target"]),
        draft=statistics.median(draft),
        target_share=statistics.median(target_shares),
        draft_share=statistics.median(draft_shares),
        rest_share=statistics.median(rest),
    )


def cost_curve(
    target: Transformer, config: EngineConfig, length: int, rounds: int
) -> list[dict[str, Any]]:
    """Cost of the target's pass over T nodes and the argmax of each, for some T."""
    programs = {
        str(nodes): target_passes(
            target,
            StaticShape(chain(nodes - 1)) if nodes > 1 else _root(),
            config,
            length,
            steps=4,
            choose=True,
        )
        for nodes in CURVE_NODES
    }
    seconds = in_turn(programs, rounds)
    return [
        {
            "nodes": int(nodes),
            "seconds": statistics.median(values),
            "ratio": spread(paired(values, seconds["1"])),
        }
        for nodes, values in seconds.items()
    ]


def target_passes(
    target: Transformer,
    shape: TreeShape,
    config: EngineConfig,
    length: int,
    steps: int,
    choose: bool = False,
) -> Callable[[], float]:
    """A program that verifies `steps` trees of a shape after a prefix.

    Args:
      target: the model.
      shape: of the tree; a dynamic one costs what a chain of as many nodes does.
      config: of the cache.
      length: tokens of prefix; what they are makes no difference to the time.
      steps: passes per call.
      choose: also take the argmax of every row.

    Returns:
      A function that runs it and returns seconds per pass.
    """
    if isinstance(shape, StaticShape):
        topology = shape.topology
    else:
        topology = chain(shape.num_nodes - 1)
    B, T = config.max_batch, topology.num_nodes
    flat = FlatModule(target)
    pages, table, lengths = _cache(target, config, length)
    tree = static_tree(
        topology, jnp.ones((B, T), jnp.int32), jnp.zeros((B, T), jnp.float32)
    )

    @jax.jit
    def passes(leaves, pages, table, lengths, tree, steps):
        model = flat.bind(leaves)

        def body(turn, tokens_BT):
            now = dataclasses.replace(tree, tokens=tokens_BT)
            logits_VR, _, _ = stepping.verify(model, now, pages, table, lengths)
            chosen_R = (
                select.argmax(logits_VR) if choose else _next_tokens(logits_VR, turn)
            )
            return chosen_R.reshape(tokens_BT.shape)

        return lax.fori_loop(0, steps, body, tree.tokens)

    return timed(
        passes, flat.leaves, pages, table, lengths, tree, np.int32(steps), passes=steps
    )


def draft_passes(
    drafter: DraftModel, config: EngineConfig, length: int, steps: int
) -> Callable[[], float]:
    """A program of the drafter's forward passes for `steps` trees, and nothing else.

    It is the drafter's own `propose` with children that are whatever falls out, so
    that choosing them takes no time, and without what nobody looks at (the tree, the
    write to the cache). Arguments as `target_passes`.
    """
    model, shape = drafter.model, drafter.shape
    B, window = config.max_batch, shape.depth + 1
    flat = FlatModule(model)
    pages, table, lengths = _cache(model, config, length)
    widths = level_widths(shape, model.config.vocab_size)

    def passes(leaves, state, context, steps):
        bound = drafter.with_module(flat.bind(leaves))

        def body(turn, pending_BW):
            def grow(shape, context, logits_VB, expand, tau):
                tokens_B = _next_tokens(logits_VB, turn)
                scratch, held = None, 0
                for depth, width in enumerate(widths, 1):
                    mask = np.ones((width, held + width), bool)
                    mask[:, held:] = np.eye(width, dtype=bool)
                    logits_VR, scratch = expand(
                        jnp.broadcast_to(tokens_B[:, None], (B, width)),
                        depth,
                        jnp.broadcast_to(mask, (B, *mask.shape)),
                        scratch,
                    )
                    tokens_B = _next_tokens(logits_VR, turn)[::width]
                    held += width
                tokens_BT = jnp.broadcast_to(tokens_B[:, None], (B, 1))
                return static_tree(
                    _root().topology, tokens_BT, jnp.zeros((B, 1), jnp.float32)
                )

            now = dataclasses.replace(state, pending=pending_BW)
            tree, _ = bound.propose(now, context, grow)
            return jnp.broadcast_to(tree.tokens, (B, window))

        return lax.fori_loop(0, steps, body, state.pending)

    state = DraftModelState(
        pages=pages,
        lengths=lengths,
        pending=jnp.ones((B, window), jnp.int32),
        pending_count=jnp.full(B, window, jnp.int32),
    )
    ones = jnp.ones(B, jnp.int32)
    context = DraftContext(
        active=ones > 0,
        root=ones,
        lengths=lengths + window - 1,
        page_table=table,
        # Neither is looked at without a choice to make.
        sampling=None,
        noise=None,
    )
    return timed(
        jax.jit(passes), flat.leaves, state, context, np.int32(steps), passes=steps
    )


def level_widths(shape: TreeShape, vocab: int) -> list[int]:
    """Nodes that a drafter expands at depth 1, 2, …; the root's pass is not listed."""
    if isinstance(shape, StaticShape):
        return [len(shape.topology.inner(d)) for d in range(1, shape.depth)]
    return [min(shape.width, vocab)] * (shape.depth - 1)


def weight_bytes(target: Transformer) -> int:
    """Bytes of parameters that a pass reads; of a separate embedding only some rows."""
    leaves = FlatModule(target).leaves
    total = sum(leaf.nbytes for leaf in leaves)
    if not target.config.tied_embeddings:
        total -= target.embedding[...].nbytes
    return total


def _root() -> StaticShape:
    return StaticShape(Topology((-1,)))


def _cache(model: Transformer, config: EngineConfig, length: int):
    """An empty cache that claims to hold `length` tokens per slot."""
    B = config.max_batch
    per_slot = -(-config.max_len // config.page_size)
    dtype = model.embedding[...].dtype
    count = B * per_slot + 1
    layout = paging.CacheLayout(
        count, config.page_size, config.lanes or 1, config.cache_dtype == "int8"
    )
    pages = paging.empty_pages(model.config, layout, dtype)
    table = jnp.arange(1, count, dtype=jnp.int32).reshape(B, per_slot)
    return pages, table, jnp.full(B, length, jnp.int32)


def _next_tokens(logits_VR, turn):
    """Tokens [R] for the next pass that depend on every row at next to no cost.

    The row is known at run time only: the product with the whole head stays.
    """
    row = turn % logits_VR.shape[0]
    score_R = lax.dynamic_index_in_dim(logits_VR, row, axis=0, keepdims=False)
    return 1 + (score_R > 1e30).astype(jnp.int32)
