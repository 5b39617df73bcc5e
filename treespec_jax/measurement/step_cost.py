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

from treespec_jax.branches import is_straight
from treespec_jax.cache import pages as paging
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.drafting.protocol import Committed, DraftContext, Sizes
from treespec_jax.engine import placement
from treespec_jax.engine import step as stepping
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.plan import prefill_plan
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import sampling_of_all
from treespec_jax.measurement.timing import in_turn, paired, spread, timed
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView
from treespec_jax.sampling import policy, select
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import StaticShape, TreeShape
from treespec_jax.trees.token_tree import static_tree
from treespec_jax.trees.topology import chain

CURVE_NODES = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Median seconds of one step and of its parts, and median shares of the step.

    Attributes:
      step: the whole, as the engine dispatches it.
      target: the target's forward pass over the tree, output head included.
      draft: the drafter's work on a tree, choosing children included.
      target_share: paired with the step of the same round, as all shares.
      draft_share: of the drafter.
      rest_share: deciding, the target's writes to its cache, the host.
    """

    step: float
    target: float
    draft: float
    target_share: float
    draft_share: float
    rest_share: float


def warm_up(
    llm,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams | None = None,
    every_shape: bool = True,
) -> None:
    """Compiles all that these prompts will run, on prompts just long enough for it.

    Args:
      llm: an `LLM`.
      prompts: token ids.
      params: how they will be sampled; penalties take a program of their own.
      every_shape: also what a long run may turn to (`engine.chooser`), and learns what
        steps of all shapes cost, if no text has begun yet (`Engine.measure_costs`).
    """
    config = llm.engine.config
    params = params or SamplingParams()
    one = dataclasses.replace(
        params, max_tokens=1, min_tokens=min(params.min_tokens, 1)
    )
    sizes = {
        size
        for prompt in prompts
        for _, size, _ in prefill_plan(len(prompt) - 1, config.prefill_chunks)
    }
    if not (one.penalised or one.min_tokens or one.logprobs):
        with llm.exclusive() as engine:
            engine.compile(sorted(sizes), every_shape, params=one)
            if every_shape and engine.is_new:
                engine.measure_costs(params=one)
    for token, size in enumerate(sorted(sizes)):
        length = min(size + 1, config.max_len - 1)
        # Greedy or not is one program. No prompt begins like another one, or it would
        # find its beginning in the cache.
        llm.generate([[token] * length], one)


def middle_of(llm, prompt: Sequence[int], emitted: Sequence[int]) -> list[int]:
    """The first half of a text, as long as a dispatch still fits behind it."""
    config = llm.engine.config
    width = llm.engine.speculation.depth + 1
    room = config.max_len - 1 - config.steps_per_dispatch * width
    text = [*prompt, *emitted[: len(emitted) // 2]]
    return text[: max(1, room)]


def step_cost(
    engine: Engine,
    target: Transformer,
    prefix: Sequence[int],
    params: SamplingParams,
    rounds: int,
) -> StepCost:
    """Times whole steps after a prefix, and the two models' passes alone.

    Args:
      engine: warm, nothing running.
      target: its target.
      prefix: tokens in front; with those of one dispatch they must fit max_len.
      params: how to sample.
      rounds: measurements of each.
    """
    config, speculation = engine.config, engine.speculation
    steps = config.steps_per_dispatch
    emitted = []
    # No text may end before the dispatch does.
    longest = steps * (speculation.depth + 1)
    params = dataclasses.replace(params, max_tokens=longest, ignore_eos=True)

    def whole():
        requests = [Request(list(prefix), params) for _ in range(config.max_batch)]
        for request in requests:
            engine.submit(request)
        before = engine.prefill_seconds
        began = time.perf_counter()
        engine.advance(shape=speculation.shape)
        prefill = engine.prefill_seconds - before
        seconds = time.perf_counter() - began - prefill
        for request in requests:
            engine.cancel(request)
        engine.drain()
        emitted.append(len(requests[0].tokens))
        return seconds / max(1, requests[0].stats.steps)

    whole()
    # The middle of what a dispatch sees.
    length = len(prefix) - 1 + emitted[0] // 2
    programs = {
        "step": whole,
        "target": target_passes(target, speculation.shape, config, length, steps),
    }
    if speculation.depth:
        programs["draft"] = draft_phases(
            speculation, target, config, length, steps, params
        )
    seconds = in_turn(programs, rounds)
    draft = seconds.get("draft", [0.0] * rounds)
    target_shares = paired(seconds["target"], seconds["step"])
    draft_shares = paired(draft, seconds["step"])
    rest = [1 - t - d for t, d in zip(target_shares, draft_shares, strict=True)]
    parts = seconds["step"], seconds["target"], draft, target_shares, draft_shares, rest
    return StepCost(*map(statistics.median, parts))


def cost_curve(
    target: Transformer, config: EngineConfig, length: int, rounds: int
) -> list[dict[str, Any]]:
    """Cost of the target's pass over T nodes and the argmax of each, for some T."""
    programs = {
        str(nodes): target_passes(
            target, StaticShape(chain(nodes - 1)), config, length, steps=4, choose=True
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
    static = isinstance(shape, StaticShape)
    topology = shape.topology if static else chain(shape.num_nodes - 1)
    B, T = config.max_batch, topology.num_nodes
    flat = FlatModule(target)
    layout, table = _layout(config)
    # An empty cache that claims to hold `length` tokens per slot.
    pages = paging.empty_pages(target.config, layout)
    lengths = jnp.full(B, length, jnp.int32)
    tree = static_tree(topology, jnp.ones((B, T), jnp.int32), jnp.zeros((B, T)))

    @jax.jit
    def passes(leaves, pages, table, lengths, tree, steps):
        model = flat.bind(leaves)

        def body(turn, tokens_BT):
            now = dataclasses.replace(tree, tokens=tokens_BT)
            prefix = CacheView(pages, table, lengths)
            logits_VR = stepping.verify(model, now, prefix).logits
            if choose:
                return select.argmax(logits_VR).reshape(B, T)
            # Tokens that depend on every row at next to no cost: the row is known at
            # run time only, so the product with the whole head stays.
            row = turn % logits_VR.shape[0]
            score_R = lax.dynamic_index_in_dim(logits_VR, row, keepdims=False)
            return 1 + (score_R > 1e30).astype(jnp.int32).reshape(B, T)

        return lax.fori_loop(0, steps, body, tree.tokens)

    args = flat.leaves, pages, table, lengths, tree, np.int32(steps)
    return timed(passes, *args, passes=steps)


def draft_phases(
    speculation: Speculation,
    target: Transformer,
    config: EngineConfig,
    length: int,
    steps: int,
    params: SamplingParams,
) -> Callable[[], float]:
    """A program of a drafter's part of `steps` steps whose trees are accepted whole.

    Arguments as for `target_passes`; every slot samples as `params` say.
    """
    drafter, shape = speculation.drafter, speculation.shape
    B, width, vocab = config.max_batch, shape.depth + 1, target.config.vocab_size
    count = drafter.needs.successors
    flats = FlatModule(drafter.module), FlatModule(target)
    layout, table = _layout(config)
    feature = jnp.zeros((B, width, target.config.embed_dim))
    features = (feature,) * len(drafter.needs.feature_layers)
    logits_VR = jax.random.normal(jax.random.key(0), (vocab, B * shape.num_nodes))
    zeros, sampling = jnp.zeros(B, jnp.int32), _sampling(target, B, params)
    # The last nodes, as if they were accepted.
    path_BC = jnp.tile(jnp.arange(shape.num_nodes - width, shape.num_nodes), (B, 1))

    def phases(leaves, state, table, lengths, steps):
        module, model = (f.bind(x) for f, x in zip(flats, leaves, strict=True))
        bound = drafter.with_module(module)

        def body(_, carry):
            state, lengths, root = carry
            context = DraftContext(
                target=model,
                vocab=vocab,
                active=jnp.ones(B, bool),
                root=root,
                lengths=lengths,
                page_table=table,
                sampling=sampling,
                randomness=Randomness(sampling, lengths, shape.num_nodes, width, vocab),
                proposal=speculation.proposal,
            )
            tree, state = bound.propose(state, shape, context)
            emitted = tree.tokens[:, -width:]
            committed = Committed(
                slot=None,
                tokens=emitted,
                following=emitted,
                root=emitted[:, -1],
                start=lengths,
                count=jnp.full(B, width, jnp.int32),
                features=features,
                page_table=table,
                # Logits that depend on the tree, so that no loop keeps their best.
                successors=stepping.successors_of(
                    logits_VR + 1e-6 * root[0],
                    tree.tokens,
                    tree.valid,
                    zeros,
                    count,
                    path_BC,
                ),
            )
            return bound.ingest(state, committed), lengths + width, emitted[:, -1]

        return lax.fori_loop(0, steps, body, (state, lengths, zeros))

    sizes = Sizes(B, config.max_len, shape.depth, layout, vocab, width)
    leaves = tuple(flat.leaves for flat in flats)

    def filled(leaves, state, table, rows):
        bound = drafter.with_module(flats[0].bind(leaves))
        return _filled(bound, state, table, length, rows)

    state = drafter.init(sizes)
    state = jax.jit(filled)(leaves[0], state, table, (features, logits_VR))
    args = leaves, state, table, jnp.full(B, length, jnp.int32), np.int32(steps)
    return timed(jax.jit(phases), *args, passes=steps)


def _filled(drafter, state, table, length: int, rows):
    """The state of a drafter whose slots hold `length` tokens each.

    Args:
      drafter: bound.
      state: of empty slots.
      table: int32 [B, max_pages].
      length: tokens.
      rows: features and logits, of which the first stand for all.
    """
    features, logits_VR = rows
    row, one = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    for slot in range(len(table)):
        committed = Committed(
            slot=jnp.int32(slot),
            tokens=row,
            following=row,
            root=one,
            start=one * length,
            count=one * 0,
            features=tuple(x[:1, :1] for x in features),
            page_table=table[slot : slot + 1],
            successors=stepping.successors_of(
                logits_VR[:, :1], row, row > 0, one * 0, drafter.needs.successors, row
            ),
        )
        state = drafter.ingest(state, committed)
    return state


def _sampling(target: Transformer, batch: int, params: SamplingParams) -> Sampling:
    """Settings of slots that ask for the same, as an engine compiles them."""
    settings = sampling_of_all(batch, params)
    straight = is_straight(placement.device(target))
    return policy.from_host(settings, straight)


def weight_bytes(target: Transformer) -> int:
    """Bytes of parameters that a pass reads; of a separate embedding only some rows."""
    leaves = FlatModule(target).leaves
    total = sum(leaf.nbytes for leaf in leaves)
    if not target.config.tied_embeddings:
        total -= target.embedding[...].nbytes
    return total


def _layout(config: EngineConfig):
    """A cache with room for every slot's text, and its page table."""
    per_slot = -(-config.max_len // config.page_size)
    count = config.max_batch * per_slot + 1
    layout = paging.CacheLayout(
        count, config.page_size, config.cache_dtype, config.lanes or 1
    )
    table = jnp.arange(1, count, dtype=jnp.int32)
    return layout, table.reshape(config.max_batch, per_slot)
