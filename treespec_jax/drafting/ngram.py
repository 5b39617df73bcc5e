"""The text so far drafts: what followed earlier matches of its last tokens.

Prompt lookup (Saxena 2023; also `prompt_lookup_num_tokens` of transformers), as a tree:
after every node the drafter looks for the last n <= `longest` tokens of the node's path
in the text, and every token that followed a match is a guess. Longer matches come
before shorter ones, later before earlier ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.checks import check_int
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import Committed, DraftContext, Level, Needs, Sizes

# Logit of a token per token of the match that it followed; 0 without a match. A match
# of three tokens then has most of q in a vocabulary of 32,000.
GAIN = 4.0
# Stands for no token.
NOBODY = -1


@dataclasses.dataclass(frozen=True)
class NgramOptions:
    """Settings of method "ngram".

    Attributes:
      longest: n, tokens of a match at most.
    """

    longest: int = 3

    def __post_init__(self):
        check_int("longest", self.longest, 1)


class NgramDrafter:
    """See `protocol.Drafter`; its state is the text, int32 [B, max_len + 1].

    Args:
      longest: see `NgramOptions`.
      tau: temperature of the estimate that a child is right.
    """

    module = None
    needs = Needs(history=True)
    Options = NgramOptions

    def __init__(self, longest: int, tau: float):
        self.longest = longest
        self.tau = tau

    @classmethod
    def make(cls, model, tau, options):
        return cls(options.longest, tau)

    def with_module(self, module):
        return self

    def init(self, sizes: Sizes) -> jax.Array:
        return jnp.full((sizes.batch, sizes.max_len + 1), NOBODY, jnp.int32)

    def ingest(self, state: jax.Array, committed: Committed) -> jax.Array:
        rows, columns = committed.tokens.shape
        end_n = committed.start + committed.count
        if committed.slot is None:
            slot_n1 = jnp.arange(rows)[:, None]
            # An idle slot keeps its root.
            end_n = jnp.where(committed.count > 0, end_n, state.shape[1])
        else:
            slot_n1 = committed.slot[None, None]
        column_C = jnp.arange(columns)
        position_nC = jnp.where(
            column_C < committed.count[:, None],
            committed.start[:, None] + column_C,
            state.shape[1],
        )
        state = state.at[slot_n1, position_nC].set(committed.tokens, mode="drop")
        return state.at[slot_n1[:, 0], end_n].set(committed.root, mode="drop")

    def copy_slot(self, state, source, destination):
        return state.at[destination].set(state[source])

    def propose(self, state: jax.Array, shape, context: DraftContext):
        B = state.shape[0]
        # The tokens up to the root; there may be fewer of them.
        position_Bn = context.lengths[:, None] + jnp.arange(1 - self.longest, 1)
        tail_Bn = jnp.take_along_axis(state, jnp.maximum(position_Bn, 0), axis=1)
        tail_Bn = jnp.where(position_Bn >= 0, tail_Bn, NOBODY)
        root_B1n = tail_Bn[:, None]

        def look_up(tail_BWn):
            scores = _scores(state, context.lengths, tail_BWn, context.vocab)
            return scores.reshape(-1, context.vocab).T

        def expand(level: Level, scratch):
            tails_BEn = root_B1n if scratch is None else scratch
            above_BWn = tails_BEn[jnp.arange(B)[:, None], level.parents]
            tail_BWn = jnp.concatenate(
                [above_BWn[:, :, 1:], level.tokens[:, :, None]], axis=2
            )
            tails_BEn = jnp.concatenate([tails_BEn, tail_BWn], axis=1)
            return look_up(tail_BWn), tails_BEn

        tree = growth.grow(shape, context, look_up(root_B1n), expand, self.tau)
        return tree, state


def _scores(text_BS, length_B, tail_BWn, vocab: int):
    """Logits [B, W, V] of the token after each tail."""
    B, S = text_BS.shape
    W, longest = tail_BWn.shape[1:]
    # At position s of the text: do the tokens up to it end like the tail?
    same_BWS, match_BWS = jnp.ones((B, W, S), bool), jnp.zeros((B, W, S), jnp.int32)
    for back in range(longest):
        shifted_BS = jnp.pad(text_BS, ((0, 0), (back, 0)), constant_values=NOBODY - 1)
        token_BW1 = tail_BWn[:, :, longest - 1 - back, None]
        same_BWS &= shifted_BS[:, None, :S] == token_BW1
        match_BWS += same_BWS
    position_S = jnp.arange(S)
    # The root, at `length`, is the last token that can follow a match.
    match_BWS = jnp.where(position_S < length_B[:, None, None], match_BWS, 0)
    score_BWS = match_BWS * GAIN + (match_BWS > 0) * (position_S / S)
    following_BS = jnp.roll(text_BS, -1, axis=1)
    slot_B11, row_W1 = jnp.arange(B)[:, None, None], jnp.arange(W)[:, None]
    return (
        jnp.zeros((B, W, vocab), jnp.float32)
        .at[slot_B11, row_W1, following_BS[:, None]]
        .max(score_BWS, mode="drop")
    )
