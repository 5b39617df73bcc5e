"""The step: draft a tree, verify it in one forward pass, accept, commit.

Pure and fixed in shape; `dispatch` runs many of them in one `lax.while_loop`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance import policy, streams
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.noise import Noise
from treespec_jax.acceptance.penalties import Penalties
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import run_chunk
from treespec_jax.drafting.protocol import DraftContext, Drafter
from treespec_jax.engine.state import Control, DecodeState, Outbox, Trees
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView


def verify(target: Transformer, tree, pages, page_table, lengths):
    """One forward pass of the target over all nodes.

    Returns:
      logits float32 [V, B·T], hidden [D, B·T], new rows per layer [B, K, 2, T, H].
    """
    with jax.named_scope("verify"):
        hidden_DR, kv = target(
            tree.tokens,
            lengths[:, None] + tree.depth,
            tree.ancestors,
            CacheView(pages, page_table, lengths),
        )
        return target.logit_columns(hidden_DR), hidden_DR, kv


def step(
    target: Transformer,
    drafter: Drafter,
    rule: Rule,
    state: DecodeState,
    control: Control,
    penalties: Penalties | None = None,
    cascade: Cascade | None = None,
):
    """Advances every active slot by one tree.

    The drafter must draw its trees in a way that `rule` may judge (`acceptance.facts`).
    `penalties` are those of the text before this step; `cascade` stands between the
    target and the policy.

    Returns:
      the new state, the new control (what remains), emitted tokens [B, C + 1], their
      counts [B] and log probabilities [B, C + 1], ranks [B, C] of the accepted nodes
      among their siblings, and `Trees` of this step.
    """
    vocab = target.config.vocab_size
    depth = drafter.depth
    active_B = control.remaining > 0
    # An idle slot has no prefix, so that it costs nothing to attend over.
    lengths = jnp.where(active_B, state.lengths, 0)
    nodes, sampling = drafter.num_nodes, control.sampling
    randomness = rule.randomness(sampling, lengths, nodes, depth, vocab)
    noise = uniforms = None
    if drafter.draws == "shared" and depth > 0:
        # What the drafter has to make anyway, the exact rule need not make again.
        kept = Noise(sampling.seed, lengths + 1, vocab)
        kept = kept.kept(depth, quiet=jnp.all(sampling.greedy))
        noise = kept.rows
        if rule.name == "exact":
            randomness = kept
    elif drafter.draws in ("sampled", "with_replacement"):
        uniforms = streams.of_proposal(sampling.seed, lengths, nodes)
    context = DraftContext(
        active=active_B,
        root=state.root,
        lengths=lengths,
        page_table=control.page_table,
        sampling=sampling,
        penalties=penalties,
        noise=noise,
        uniforms=uniforms,
    )
    with jax.named_scope("draft"):
        tree, draft = drafter.propose(state.draft, context)
    logits_VR, hidden_DR, kv = verify(
        target, tree, state.pages, control.page_table, lengths
    )
    with jax.named_scope("accept"):
        scored_VR = logits_VR
        if penalties is not None:
            scored_VR = penalties.apply(
                logits_VR, tree.tokens[:, 1:], tree.ancestors[:, :, 1:]
            )
        if cascade is not None:
            scores_VR = policy.scores(scored_VR, sampling.opened())
            scores_VBT = scores_VR.reshape(-1, *tree.depth.shape)
            scores_VBT = cascade.scores(tree, scores_VBT, sampling.greedy)
            scored_VR = scores_VBT.reshape(scored_VR.shape)
            sampling = sampling.settled()
        verdict = rule.decide(tree, scored_VR, sampling, randomness, depth)
        count_B, ended_B = _cut(verdict, control)
        count_B = jnp.where(active_B, count_B, 0)
        logprobs_BC = _logprobs(logits_VR, verdict, control)
    pages = paging.commit(
        state.pages,
        control.page_table,
        lengths,
        kv,
        verdict.path,
        count_B,
        after=jnp.all(verdict.emitted >= 0),
    )
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    newest_B = jnp.take_along_axis(verdict.emitted, last_B1, axis=1)[:, 0]
    with jax.named_scope("extend"):
        features_DBT = hidden_DR.reshape(hidden_DR.shape[0], *tree.tokens.shape)
        features_DBC = jnp.take_along_axis(features_DBT, verdict.path[None], axis=2)
        draft = drafter.extend(
            draft, verdict.emitted, features_DBC.transpose(1, 2, 0), count_B
        )
    state = DecodeState(
        pages=pages,
        lengths=state.lengths + count_B,
        root=jnp.where(active_B, newest_B, state.root),
        draft=draft,
    )
    left_B = jnp.where(ended_B, 0, control.remaining - count_B)
    control = dataclasses.replace(control, remaining=left_B)
    trees = Trees(
        parents=tree.parents,
        log_chance=jnp.where(tree.valid, tree.draft_logprob, -jnp.inf),
        path=verdict.path,
    )
    ranks_BC = _ranks(tree, verdict.path)
    return state, control, verdict.emitted, count_B, logprobs_BC, ranks_BC, trees


def _cut(verdict, control: Control):
    """Tokens to keep per slot: up to the limit, and up to an end-of-text token."""
    count_B = jnp.minimum(verdict.count + 1, control.remaining)
    is_end_BC = jnp.any(verdict.emitted[:, :, None] == control.eos[:, None, :], axis=-1)
    at_C = jnp.arange(verdict.emitted.shape[1])
    is_end_BC &= at_C < count_B[:, None]
    ended_B = jnp.any(is_end_BC, axis=1)
    first_B = jnp.argmax(is_end_BC, axis=1).astype(jnp.int32)
    return jnp.where(ended_B, first_B + 1, count_B), ended_B


def _logprobs(logits_VR, verdict, control: Control):
    """Log p of the emitted tokens [B, C + 1]; computed only when somebody asked."""

    def compute():
        slots, nodes = (
            verdict.path.shape[0],
            logits_VR.shape[1] // verdict.path.shape[0],
        )
        column_BC = verdict.path + nodes * jnp.arange(slots)[:, None]
        rows_BCV = logits_VR.T[column_BC]
        total = jax.nn.logsumexp(rows_BCV, axis=-1)
        return (
            jnp.take_along_axis(rows_BCV, verdict.emitted[:, :, None], axis=2)[..., 0]
            - total
        )

    return lax.cond(
        jnp.any(control.want_logprobs),
        compute,
        lambda: jnp.zeros(verdict.path.shape, jnp.float32),
    )


def _ranks(tree, path_BC):
    """How many siblings stand before each node of a path [B, C], the root left out."""
    node_T = jnp.arange(tree.parents.shape[1])
    above_BC1, own_BC1 = path_BC[:, :-1, None], path_BC[:, 1:, None]
    sibling_BT = tree.valid & (node_T > 0)
    before_BCT = (tree.parents[:, None] == above_BC1) & (node_T < own_BC1)
    return jnp.sum(before_BCT & sibling_BT[:, None], axis=2, dtype=jnp.int32)


def dispatch(
    target: Transformer,
    drafter: Drafter,
    rule: Rule,
    state: DecodeState,
    control: Control,
    steps: int,
    cascade: Cascade | None = None,
    record: bool = False,
) -> tuple[DecodeState, Outbox]:
    """Runs up to `steps` steps, fewer when every slot is done; may record trees."""
    B, width = state.root.shape[0], drafter.depth + 1
    outbox = Outbox(
        tokens=jnp.zeros((steps, B, width), jnp.int32),
        counts=jnp.zeros((steps, B), jnp.int32),
        logprobs=jnp.zeros((steps, B, width), jnp.float32),
        ranks=jnp.zeros((steps, B, width - 1), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        trees=_no_trees(steps, B, drafter) if record else None,
    )

    def unfinished(carry):
        _, remaining, _, outbox = carry
        return jnp.any(remaining > 0) & (outbox.steps < control.max_steps)

    def body(carry):
        state, remaining, penalties, outbox = carry
        now = dataclasses.replace(control, remaining=remaining)
        state, now, tokens, counts, logprobs, ranks, trees = step(
            target, drafter, rule, state, now, penalties, cascade
        )
        if penalties is not None:
            penalties = penalties.after(tokens, counts)
        at = outbox.steps
        outbox = Outbox(
            tokens=lax.dynamic_update_index_in_dim(outbox.tokens, tokens, at, 0),
            counts=lax.dynamic_update_index_in_dim(outbox.counts, counts, at, 0),
            logprobs=lax.dynamic_update_index_in_dim(outbox.logprobs, logprobs, at, 0),
            ranks=lax.dynamic_update_index_in_dim(outbox.ranks, ranks, at, 0),
            steps=at + 1,
            trees=jax.tree.map(
                lambda x, own: lax.dynamic_update_index_in_dim(x, own, at, 0),
                outbox.trees,
                trees if record else None,
            ),
        )
        return state, now.remaining, penalties, outbox

    penalties = None
    if control.text is not None:
        penalties = control.text.tables(target.config.vocab_size)
    state, _, _, outbox = lax.while_loop(
        unfinished, body, (state, control.remaining, penalties, outbox)
    )
    return state, outbox


def _no_trees(steps: int, batch: int, drafter: Drafter) -> Trees:
    nodes = steps, batch, drafter.num_nodes
    return Trees(
        parents=jnp.zeros(nodes, jnp.int32),
        log_chance=jnp.zeros(nodes, jnp.float32),
        path=jnp.zeros((steps, batch, drafter.depth + 1), jnp.int32),
    )


def prefill(
    target: Transformer,
    drafter: Drafter,
    state: DecodeState,
    slot: jax.Array,
    tokens_1T: jax.Array,
    start: jax.Array,
    count: jax.Array,
    root: jax.Array,
    page_table_1P: jax.Array,
) -> DecodeState:
    """Takes in a chunk of one slot's prompt; leaves the slot ready to step from `root`.

    Args:
      target: the model.
      drafter: it sees the same chunk.
      state: of all slots.
      slot: int32.
      tokens_1T: int32 [1, T], the first `count` real.
      start: int32, absolute position of the first.
      count: int32, may be 0.
      root: int32, the prompt token after the chunk.
      page_table_1P: int32 [1, max_pages].
    """
    with jax.named_scope("prefill"):
        pages = run_chunk(target, state.pages, tokens_1T, start, count, page_table_1P)
        draft = drafter.prefill(
            state.draft, slot, tokens_1T, start, count, page_table_1P
        )
    length = start + count
    return DecodeState(
        pages=pages,
        lengths=state.lengths.at[slot].set(length),
        root=state.root.at[slot].set(root),
        draft=drafter.insert(draft, slot, root, length),
    )
