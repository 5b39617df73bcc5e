"""The step: propose a tree, verify it in one forward pass, decide, commit.

Pure and fixed in shape; `dispatch` runs many of them in one `lax.while_loop`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import Chunk, run_chunk
from treespec_jax.config import EngineConfig
from treespec_jax.drafting.protocol import Committed, DraftContext, Successors
from treespec_jax.engine.emission import Decided, emission_of, log_probs_of
from treespec_jax.engine.rehearsal import Watching, backlog, window
from treespec_jax.engine.state import (
    Control,
    DecodeState,
    Outbox,
    PromptScores,
    StepResult,
)
from treespec_jax.models.transformer import Forward, Transformer
from treespec_jax.models.views import CacheView
from treespec_jax.sampling import policy, select
from treespec_jax.sampling.penalties import Penalties
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape
from treespec_jax.trees.token_tree import TokenTree, number_of_children, only_roots


@dataclasses.dataclass(frozen=True)
class Turn:
    """What all phases of a step look at.

    Attributes:
      control: of the dispatch.
      active: bool [B].
      lengths: int32 [B], tokens before the root; 0 for an idle slot, which then has no
        prefix and costs nothing to attend over.
      penalties: of the text before this step; None if no request has any.
      randomness: of the step.
    """

    control: Control
    active: jax.Array
    lengths: jax.Array
    penalties: Penalties | None
    randomness: Randomness


@dataclasses.dataclass(frozen=True)
class Proposed:
    """A tree, and the drafter's state after it."""

    tree: TokenTree
    draft: Any


@dataclasses.dataclass(frozen=True)
class Verified:
    """The target's pass over a tree.

    Attributes:
      logits: float32 [V, R], R = B·T columns, B major.
      forward: the pass.
    """

    logits: jax.Array
    forward: Forward


def step(
    target: Transformer,
    speculation: Speculation,
    shape: TreeShape,
    state: DecodeState,
    control: Control,
    penalties: Penalties | None = None,
) -> StepResult:
    """Advances every active slot by one tree of the given shape."""
    turn = turn_of(target, shape, state, control, penalties)
    proposed = propose(target, speculation, shape, state, turn)
    tree = only_roots(proposed.tree, ~control.speculate)
    proposed = dataclasses.replace(proposed, tree=tree)
    verified = verify(
        target,
        tree,
        CacheView(state.pages, control.page_table, turn.lengths),
        speculation.drafter.needs.feature_layers,
    )
    decided = decide(speculation, tree, verified, turn, shape.depth)
    emission = emission_of(tree, verified.logits, decided, control)
    return StepResult(
        commit(speculation, state, proposed, verified, decided, turn), emission
    )


def is_active(state: DecodeState, control: Control) -> jax.Array:
    """bool [B]: slots that may emit a token."""
    return ~state.ended & (state.lengths < control.limits)


def turn_of(
    target: Transformer,
    shape: TreeShape,
    state: DecodeState,
    control: Control,
    penalties: Penalties | None,
) -> Turn:
    """What all phases of a step look at."""
    active_B = is_active(state, control)
    lengths_B = jnp.where(active_B, state.lengths, 0)
    randomness = Randomness(
        control.sampling,
        lengths_B,
        shape.num_nodes,
        shape.depth,
        target.config.vocab_size,
    )
    return Turn(control, active_B, lengths_B, penalties, randomness)


def propose(
    target: Transformer,
    speculation: Speculation,
    shape: TreeShape,
    state: DecodeState,
    turn: Turn,
) -> Proposed:
    """The drafter's tree."""
    context = context_of(target, speculation, state, turn)
    with jax.named_scope("propose"):
        return Proposed(*speculation.drafter.propose(state.draft, shape, context))


def context_of(
    target: Transformer, speculation: Speculation, state: DecodeState, turn: Turn
) -> DraftContext:
    """What the drafter looks at."""
    return DraftContext(
        target=target,
        vocab=target.config.vocab_size,
        active=turn.active,
        root=state.root,
        lengths=turn.lengths,
        page_table=turn.control.page_table,
        sampling=turn.control.sampling,
        randomness=turn.randomness,
        proposal=speculation.proposal,
        penalties=turn.penalties,
        level_price=turn.control.level_price,
        temperature=speculation.draft_temperature,
        adaptive=turn.control.adaptive,
    )


def verify(
    target: Transformer,
    tree: TokenTree,
    prefix: CacheView,
    feature_layers: tuple[int, ...] = (),
) -> Verified:
    """One forward pass of the target over all nodes."""
    with jax.named_scope("verify"):
        forward = target(
            tree.tokens,
            prefix.lengths[:, None] + tree.depth,
            tree.ancestors,
            prefix,
            feature_layers=feature_layers,
        )
        return Verified(target.logit_columns(forward.hidden), forward)


def decide(
    speculation: Speculation,
    tree: TokenTree,
    verified: Verified,
    turn: Turn,
    depth: int,
) -> Decided:
    """What the rule keeps, up to a slot's limit and the end of its text."""
    control, sampling = turn.control, turn.control.sampling
    with jax.named_scope("decide"):
        logits_VR = verified.logits
        if turn.penalties is not None:
            logits_VR = turn.penalties.apply(
                logits_VR, tree.tokens[:, 1:], tree.ancestors[:, :, 1:]
            )
        if control.adaptive is not None:
            children_BT = number_of_children(tree)
            logits_VR = control.adaptive.temper(logits_VR, tree.depth, children_BT)
        if speculation.cascade is not None:
            p = policy.distributions(logits_VR, sampling.softened())
            log_p_VBT = p.log_probabilities().reshape(-1, *tree.depth.shape)
            scores = speculation.cascade.scores(tree, log_p_VBT, sampling.greedy)
            scores = scores.reshape(logits_VR.shape)
            if turn.penalties is not None:
                scores = turn.penalties.keep_forbidden(scores, logits_VR)
            logits_VR = scores
            sampling = sampling.neutral()
        verdict = speculation.rule.decide(
            tree, logits_VR, sampling, turn.randomness, depth
        )
        room_B = control.limits - turn.lengths
        counts_B = jnp.minimum(verdict.count + 1, room_B)
        is_end_BC = jnp.any(
            verdict.emitted[:, :, None] == control.eos[:, None, :], axis=-1
        )
        is_end_BC &= jnp.arange(depth + 1) < counts_B[:, None]
        ended_B = jnp.any(is_end_BC, axis=1)
        first_B = jnp.argmax(is_end_BC, axis=1).astype(jnp.int32)
        counts_B = jnp.where(ended_B, first_B + 1, counts_B)
        return Decided(
            verdict, jnp.where(turn.active, counts_B, 0), turn.active & ended_B
        )


def commit(
    speculation: Speculation,
    state: DecodeState,
    proposed: Proposed,
    verified: Verified,
    decided: Decided,
    turn: Turn,
) -> DecodeState:
    """Writes the accepted keys and values, and tells the drafter."""
    verdict, counts_B = decided.verdict, decided.counts
    page_table, tree = turn.control.page_table, proposed.tree
    pages = paging.commit(
        state.pages,
        paging.Destination(page_table, turn.lengths, counts_B),
        verified.forward.kv,
        verdict.path,
        after=jnp.all(verdict.emitted >= 0),
    )
    last_B1 = jnp.maximum(counts_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(verdict.emitted, last_B1, axis=1)[:, 0]
    root_B = jnp.where(turn.active, newest_B, state.root)

    def on_path(x_DR):
        x_DBT = x_DR.reshape(x_DR.shape[0], *tree.tokens.shape)
        x_DBC = jnp.take_along_axis(x_DBT, verdict.path[None], axis=2)
        return x_DBC.transpose(1, 2, 0)

    with jax.named_scope("ingest"):
        committed = Committed(
            slot=None,
            tokens=jnp.take_along_axis(tree.tokens, verdict.path, axis=1),
            following=verdict.emitted,
            root=root_B,
            start=turn.lengths,
            count=counts_B,
            features=tuple(map(on_path, verified.forward.features)),
            page_table=page_table,
            successors=successors_of(
                verified.logits,
                tree.tokens,
                tree.valid & turn.active[:, None],
                jnp.take_along_axis(verdict.path, last_B1, axis=1)[:, 0],
                speculation.drafter.needs.successors,
                verdict.path,
            ),
        )
        draft = speculation.drafter.ingest(proposed.draft, committed)
    return DecodeState(
        pages=pages,
        lengths=state.lengths + counts_B,
        root=root_B,
        ended=state.ended | decided.ended,
        draft=draft,
    )


def successors_of(
    logits_VR: jax.Array,
    tokens: jax.Array,
    real: jax.Array,
    newest: jax.Array,
    count: int,
    path: jax.Array,
) -> Successors | None:
    """The `count` likeliest tokens after each of R = n·T rows; None if count is 0.

    Args:
      logits_VR: float32, the target's.
      tokens: see `Successors`, like those that follow.
      real: of the rows.
      newest: of the root.
      count: K, at most V are looked at.
      path: of the committed rows.
    """
    if not count:
        return None
    with jax.named_scope("successors"):
        logits_RK, best_RK = select.top_k(logits_VR, min(count, logits_VR.shape[0]))
        shape = *tokens.shape, -1
        best, logits = best_RK.reshape(shape), logits_RK.reshape(shape)
        return Successors(tokens, real, best, logits, newest, path)


def dispatch(
    models: tuple[Transformer, Speculation],
    shape: TreeShape,
    state: DecodeState,
    control: Control,
    config: EngineConfig,
    rehearsed: TreeShape | None = None,
) -> tuple[DecodeState, Outbox]:
    """Runs steps until every slot is done, as many as a dispatch has at most.

    Args:
      models: the target, and the drafter in its speculation.
      shape: of the steps' trees.
      state: of all slots.
      control: of the dispatch.
      config: fixed sizes.
      rehearsed: shape of a tree that is grown before the first of plain steps, which
        nobody verifies (`engine.rehearsal`); None: none is.
    """
    target, speculation = models
    penalties = None
    if control.text is not None:
        penalties = control.text.tables(target.config.vocab_size)
    before, watching, rehearsal = state, None, None
    steps, drafter = config.steps_per_dispatch, speculation.drafter
    waits = speculation.depth > shape.depth == 0 and Watching.fits(speculation, steps)
    if waits or rehearsed:
        grown = rehearsed or shape
        turn = turn_of(target, grown, state, control, penalties)
        if rehearsed or not backlog(speculation, steps):
            proposed = propose(target, speculation, grown, state, turn)
            draft = proposed.draft
        else:
            context = context_of(target, speculation, state, turn)
            draft = drafter.postpone(state.draft, context)
    narrow = drafter.needs.waits and shape.depth > 0
    if narrow:
        state = _narrowed(speculation, shape, state, control)
    if rehearsed:
        rehearsal = dataclasses.replace(proposed.tree, proposal=None, source=None)
    if waits:
        # What waited has gone through the drafter's model, or waits behind it.
        before = dataclasses.replace(state, draft=draft)
        watching = Watching(drafter, steps)
        seen = watching.begin(config.max_batch, target)
        speculation = dataclasses.replace(speculation, drafter=watching)
        state = dataclasses.replace(state, draft=seen)

    def unfinished(carry):
        state, _, outbox = carry
        active = jnp.any(is_active(state, control))
        return active & (outbox.steps < control.max_steps)

    def body(carry):
        state, penalties, outbox = carry
        result = step(target, speculation, shape, state, control, penalties)
        emission = result.emission
        if not config.record:
            emission = dataclasses.replace(emission, trees=None)
        if penalties is not None:
            penalties = penalties.after(emission.tokens, emission.counts)
        emissions = jax.tree.map(
            lambda x, new: lax.dynamic_update_index_in_dim(x, new, outbox.steps, 0),
            outbox.emission,
            emission,
        )
        outbox = dataclasses.replace(outbox, emission=emissions, steps=outbox.steps + 1)
        return result.state, penalties, outbox

    outbox = Outbox.empty(config, shape, control.top)
    state, _, outbox = lax.while_loop(unfinished, body, (state, penalties, outbox))
    if narrow:
        draft = drafter.widened(state.draft, window(speculation, steps))
        state = dataclasses.replace(state, draft=draft)
    if watching is not None:
        state = watching.finish(before, state, outbox.emission, control.page_table)
    return state, dataclasses.replace(outbox, rehearsed=rehearsal)


def _narrowed(speculation, shape, state: DecodeState, control) -> DecodeState:
    """The state of a drafter that lets tokens wait, for trees of one shape."""
    # In the plan, and not ended: whoever has no room now may have some later.
    alive_B = (control.limits > 0) & ~state.ended
    draft = speculation.drafter.narrowed(
        state.draft, shape.depth + 1, control.page_table, alive_B
    )
    return dataclasses.replace(state, draft=draft)


def catch_up(
    speculation: Speculation, state: DecodeState, control: Control
) -> DecodeState:
    """Takes in the backlog of a drafter that lets tokens wait."""
    active_B = is_active(state, control)
    draft = speculation.drafter.catch_up(state.draft, control.page_table, active_B)
    return dataclasses.replace(state, draft=draft)


def prefill(
    target: Transformer,
    speculation: Speculation,
    state: DecodeState,
    slot: jax.Array,
    chunk: Chunk,
    following: tuple[jax.Array, jax.Array],
) -> tuple[DecodeState, PromptScores | None]:
    """Takes in a chunk of one slot's prompt; leaves the slot ready to step from `root`.

    Args:
      target: the model.
      speculation: its drafter sees the same chunk.
      state: of all slots.
      slot: int32.
      chunk: of its prompt.
      following: int32 [1, T], the token after each of the chunk's, and int32 [1], the
        root: the token after the chunk.

    Returns:
      The state, and what was asked for of the chunk; None if nothing was.
    """
    drafter, (following_1T, root_1) = speculation.drafter, following
    with jax.named_scope("prefill"):
        pages, forward = run_chunk(
            target, state.pages, chunk, drafter.needs.feature_layers
        )
        successors, columns_T = None, jnp.arange(chunk.tokens.shape[1])
        if drafter.needs.successors or chunk.top is not None:
            logits_VR = target.logit_columns(forward.hidden)
        if drafter.needs.successors:
            successors = successors_of(
                logits_VR,
                chunk.tokens,
                columns_T < chunk.count[:, None],
                jnp.maximum(chunk.count - 1, 0),
                drafter.needs.successors,
                columns_T[None],
            )
        committed = Committed(
            slot=slot,
            tokens=chunk.tokens,
            following=following_1T,
            root=root_1,
            start=chunk.start,
            count=chunk.count,
            features=tuple(x_DR.T[None] for x_DR in forward.features),
            page_table=chunk.page_table,
            successors=successors,
        )
        draft = drafter.ingest(state.draft, committed)
        scores = None
        if chunk.top is not None:
            scores = PromptScores(*log_probs_of(logits_VR, following_1T, chunk.top))
    state = DecodeState(
        pages=pages,
        lengths=state.lengths.at[slot].set((chunk.start + chunk.count)[0]),
        root=state.root.at[slot].set(root_1[0]),
        ended=state.ended.at[slot].set(False),
        draft=draft,
    )
    return state, scores
