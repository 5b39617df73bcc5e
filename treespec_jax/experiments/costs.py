"""What a step spends its time on, and what verifying T nodes costs.

Every figure comes from compiled loops of several passes, timed in turn with those that
it is compared to, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.acceptance import policy
from treespec_jax.cache import pages as paging
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine import step as stepping
from treespec_jax.engine.engine import Engine, Request
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView
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


def in_turn(
    programs: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Runs programs in turn and in rotated order; each returns its seconds."""
    names = list(programs)
    seconds = {name: [] for name in names}
    for program in programs.values():
        program()
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            seconds[name].append(programs[name]())
    return seconds


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
    most = steps * (engine.drafter.depth + 1)
    params = dataclasses.replace(params, max_tokens=most, ignore_eos=True)

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
        programs["draft"] = draft_passes(
            engine.drafter.module, shape, config, length, steps
        )
    seconds = in_turn(programs, rounds)
    draft = seconds.get("draft", [0.0] * rounds)
    target_shares = [
        t / s for t, s in zip(seconds["target"], seconds["step"], strict=True)
    ]
    draft_shares = [d / s for d, s in zip(draft, seconds["step"], strict=True)]
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
) -> dict[int, list[float]]:
    """Seconds of the target's pass over T nodes and the choice after each, by T."""
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
    return {int(n): s for n, s in in_turn(programs, rounds).items()}


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
            logits_BTV, _, _ = stepping.verify(model, now, pages, table, lengths)
            if choose:
                return policy.argmax(logits_BTV)
            return _next_tokens(logits_BTV, turn)

        return lax.fori_loop(0, steps, body, tree.tokens)

    return _timed(passes, (flat.leaves, pages, table, lengths, tree), steps)


def draft_passes(
    model: Transformer, shape: TreeShape, config: EngineConfig, length: int, steps: int
) -> Callable[[], float]:
    """A program of the drafter's forward passes for `steps` trees, and nothing else.

    The rows of every pass are those of `drafting.draft_model`; children are whatever
    falls out, so that choosing them takes no time. Arguments as `target_passes`.
    """
    B, window = config.max_batch, shape.depth + 1
    flat = FlatModule(model)
    pages, table, lengths = _cache(model, config, length)
    widths = level_widths(shape, model.config.vocab_size)

    @jax.jit
    def passes(leaves, pages, table, lengths, pending_BW, steps):
        model = flat.bind(leaves)
        view = CacheView(pages, table, lengths)

        def body(turn, pending_BW):
            chain_WW = jnp.tril(jnp.ones((window, window), bool))
            hidden_DR, _ = model(
                pending_BW,
                lengths[:, None] + jnp.arange(window),
                jnp.broadcast_to(chain_WW, (B, window, window)),
                view,
            )
            logits_BV = model.logits(hidden_DR.reshape(-1, B, window)[:, :, -1])
            token_B1 = _next_tokens(logits_BV[:, None], turn)
            scratch, held = None, 0
            for depth, width in enumerate(widths, 1):
                own = np.eye(width, dtype=bool)
                mask = np.concatenate([np.ones((width, held), bool), own], axis=1)
                tokens_BW = jnp.broadcast_to(token_B1, (B, width))
                hidden_DR, kv = model(
                    tokens_BW,
                    jnp.broadcast_to(lengths[:, None] + depth, (B, width)),
                    jnp.broadcast_to(mask, (B, *mask.shape)),
                    view,
                    scratch,
                )
                logits = model.logits(hidden_DR).reshape(B, width, -1)
                token_B1 = _next_tokens(logits, turn)[:, :1]
                if scratch is not None:
                    kv = tuple(
                        jnp.concatenate(pair, axis=3)
                        for pair in zip(scratch, kv, strict=True)
                    )
                scratch, held = kv, held + width
            return jnp.broadcast_to(token_B1, (B, window))

        return lax.fori_loop(0, steps, body, pending_BW)

    pending = jnp.ones((B, window), jnp.int32)
    return _timed(passes, (flat.leaves, pages, table, lengths, pending), steps)


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
    pages = paging.empty_pages(model.config, count, config.page_size, dtype)
    table = jnp.arange(1, count, dtype=jnp.int32).reshape(B, per_slot)
    return pages, table, jnp.full(B, length, jnp.int32)


def _next_tokens(logits_BTV, turn):
    """Tokens for the next pass that depend on every row at next to no cost.

    The column is known at run time only: the product with the whole head stays.
    """
    column = turn % logits_BTV.shape[-1]
    score_BT = lax.dynamic_index_in_dim(logits_BTV, column, axis=2, keepdims=False)
    return 1 + (score_BT > 1e30).astype(jnp.int32)


def _timed(passes, args, steps: int) -> Callable[[], float]:
    steps_ = np.int32(steps)

    def run():
        began = time.perf_counter()
        jax.block_until_ready(passes(*args, steps_))
        return (time.perf_counter() - began) / steps

    return run
