"""Earlier matches of the end of a text, and the tokens that followed them.

Two corpora on the device: each slot's text so far (prompt and output), and a ring of
what earlier requests wrote, which all slots share. Every place of both is compared with
the end of a slot's text at once, backwards up to the longest match that counts; the
longest matches, and of equal ones the latest, are followed. That is what a suffix
automaton or a table of hashes would find, without their state: a comparison of some
thousand numbers is nothing beside a step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.drafting.protocol import Committed, Sizes
from treespec_jax.drafting.rates import Rates
from treespec_jax.errors import UserError
from treespec_jax.sampling.select import top_k

# Stands for no token; what it never equals stands past the beginning of a text.
NOBODY, NOWHERE = -1, -2
# A match longer by a token weighs so much more.
GAIN = 4.0
# Whole numbers up to this one are exact in float32.
EXACT = 1 << 24
# Lengths of matches that are worth the same, by their least, and what at first.
LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)
PRIOR = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """The corpora.

    Attributes:
      text: int32 [B, S], NOBODY past the end.
      lengths: int32 [B], tokens so far, the root included.
      history: int32 [H], a ring; texts end with NOBODY.
      written: int32 [], place of the ring that is written next.
    """

    text: jax.Array
    lengths: jax.Array
    history: jax.Array
    written: jax.Array

    @classmethod
    def empty(cls, sizes: Sizes, history: int) -> Texts:
        """Without a token.

        Args:
          sizes: of the texts.
          history: H, may be 0.
        """
        return cls(
            text=jnp.full((sizes.batch, sizes.max_len + 1), NOBODY, jnp.int32),
            lengths=jnp.zeros(sizes.batch, jnp.int32),
            history=jnp.full(history, NOBODY, jnp.int32),
            written=jnp.zeros((), jnp.int32),
        )

    def ingest(self, committed: Committed) -> Texts:
        """With committed tokens; a new text sends the slot's last one to the ring."""
        rows, columns = committed.tokens.shape
        size = self.text.shape[1]
        end_n = committed.start + committed.count
        texts = self
        if committed.slot is None:
            slot_n = jnp.arange(rows)
            # An idle slot keeps its root.
            end_n = jnp.where(committed.count > 0, end_n, size)
        else:
            slot_n = committed.slot[None]
            texts = self._begin(committed.slot, committed.start[0] == 0)
        column_C = jnp.arange(columns)
        position_nC = jnp.where(
            column_C < committed.count[:, None],
            committed.start[:, None] + column_C,
            size,
        )
        text = texts.text.at[slot_n[:, None], position_nC].set(
            committed.tokens, mode="drop"
        )
        text = text.at[slot_n, end_n].set(committed.root, mode="drop")
        lengths = jnp.where(end_n < size, end_n + 1, texts.lengths[slot_n])
        return dataclasses.replace(
            texts, text=text, lengths=texts.lengths.at[slot_n].set(lengths)
        )

    def copy_slot(self, source: jax.Array, destination: jax.Array) -> Texts:
        """With one slot's text copied over another's."""
        return dataclasses.replace(
            self,
            text=self.text.at[destination].set(self.text[source]),
            lengths=self.lengths.at[destination].set(self.lengths[source]),
        )

    def _begin(self, slot, begins) -> Texts:
        """An empty slot, if `begins`; its text goes to the ring."""
        size, ring = self.text.shape[1], self.history.shape[0]
        length = jnp.where(begins, self.lengths[slot], 0)
        texts = self
        if ring:
            number = jnp.arange(size)
            # With its end, and no more than fits: the last tokens are worth most.
            wanted = (number <= length) & (length > 0) & (number > length - ring)
            place = jnp.where(wanted, (self.written + number) % ring, ring)
            more = jnp.where(number < length, self.text[slot], NOBODY)
            texts = dataclasses.replace(
                self,
                history=self.history.at[place].set(more, mode="drop"),
                written=(self.written + jnp.where(length > 0, length + 1, 0)) % ring,
            )
        row = jnp.where(begins, NOBODY, self.text[slot])
        return dataclasses.replace(
            texts,
            text=self.text.at[slot].set(row),
            lengths=self.lengths.at[slot].set(self.lengths[slot] - length),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matches:
    """Where the end of each text stood before; P matches a slot, the best first.

    Attributes:
      following: int32 [B, P, C], the tokens after a match; NOBODY past its end.
      lengths: int32 [B, P], of the matches; 0 for none.
    """

    following: jax.Array
    lengths: jax.Array

    @classmethod
    def none(cls, sizes: Sizes, count: int) -> Matches:
        """No match in any slot, of room for `count`."""
        shape = sizes.batch, count
        following = jnp.full((*shape, sizes.depth), NOBODY, jnp.int32)
        return cls(following, jnp.zeros(shape, jnp.int32))

    def forgotten(self) -> Matches:
        """Without a match, of the same room."""
        return dataclasses.replace(self, lengths=jnp.zeros_like(self.lengths))

    def copy_slot(self, source: jax.Array, destination: jax.Array) -> Matches:
        """With one slot's matches copied over another's."""
        return jax.tree.map(lambda x: x.at[destination].set(x[source]), self)


def find(
    texts: Texts,
    tail_BWn: jax.Array,
    depth: int,
    count: int,
    history: int,
    guessed: int = 0,
) -> Matches:
    """The longest matches of some tails, of equal ones the latest.

    A slot's text comes before the ring. What follows a match that overlaps the end of
    the text goes on in circles, as a text that repeats itself does.

    Args:
      texts: what to search.
      tail_BWn: int32 [B, W, n], the tokens that are looked for, oldest first; NOBODY
        for tokens that a short text lacks.
      depth: C, tokens wanted after a match.
      count: P, of matches.
      history: 0 to leave the ring out.
      guessed: how many of a tail's last tokens are guesses, which come after the text.

    Returns:
      Matches of B·W rows.
    """
    B, W, longest = tail_BWn.shape
    text_BS, ring = texts.text, texts.history.shape[0] if history else 0
    S = text_BS.shape[1]

    def runs(corpus, wraps):
        """Tokens [B, W, ...] up to each place that end like the tail."""
        alive, run = True, 0
        for back in range(longest):
            if wraps:
                shifted = jnp.roll(corpus, back, axis=1)
            else:
                shifted = jnp.pad(corpus, ((0, 0), (back, 0)), constant_values=NOWHERE)[
                    :, : corpus.shape[1]
                ]
            token_BW1 = tail_BWn[:, :, longest - 1 - back, None]
            alive = alive & (shifted[:, None] == token_BW1) & (token_BW1 != NOBODY)
            run = run + alive
        return run

    # The newest token is the last that can follow a match.
    last_B11 = texts.lengths[:, None, None] - 1
    place_S = jnp.arange(S)
    run_BWS = jnp.where(place_S < last_B11, runs(text_BS, False), 0)
    order_BWS = jnp.broadcast_to(ring + place_S, run_BWS.shape)
    if ring:
        run_BWH = runs(jnp.broadcast_to(texts.history, (B, ring)), True)
        age_H = (jnp.arange(ring) - texts.written) % ring
        # The oldest and the newest place are neighbours and belong to two texts: a
        # match does not pass from one to the other, because an end lies between.
        run_BWS = jnp.concatenate([run_BWS, run_BWH], axis=2)
        age_BWH = jnp.broadcast_to(age_H, run_BWH.shape)
        order_BWS = jnp.concatenate([order_BWS, age_BWH], axis=2)
    size = S + ring
    score_BWS = run_BWS * size + jnp.where(run_BWS > 0, order_BWS, 0)
    if _scores(longest, size) <= EXACT:
        # Whose top-k is the quick one.
        score_BWS = score_BWS.astype(jnp.float32)
    score_RP, place_RP = top_k(score_BWS.reshape(B * W, size).T, min(count, size))
    lacking = (0, 0), (0, count - score_RP.shape[1])
    score_RP, place_RP = jnp.pad(score_RP, lacking), jnp.pad(place_RP, lacking)
    lengths_RP = score_RP.astype(jnp.int32) // size
    slot_R1 = jnp.repeat(jnp.arange(B), W)[:, None]
    guesses_RG = tail_BWn.reshape(B * W, longest)[:, longest - guessed :]
    following = _after(texts, slot_R1, place_RP, guesses_RG, depth)
    return Matches(jnp.where(lengths_RP[:, :, None] > 0, following, NOBODY), lengths_RP)


def check_search(longest: int, history: int, max_len: int) -> None:
    """Raises UserError if matches in so many tokens cannot be told apart."""
    if _scores(longest, max_len + 1 + history) >= 1 << 31:
        raise UserError(
            f"longest={longest} is too long to search max_len={max_len} and "
            f"history={history} tokens; lower it"
        )


def _scores(longest: int, size: int) -> int:
    """How many scores there are of matches in `size` tokens."""
    return (longest + 1) * size


def _after(texts: Texts, slot_R1, place_RP, guesses_RG, depth: int):
    """The tokens [R, P, C] after places of the text, or of the ring behind it.

    Guesses come after the text.
    """
    S, ring = texts.text.shape[1], texts.history.shape[0]
    guessed, step_C = guesses_RG.shape[1], jnp.arange(depth)
    # Text that reaches its end goes on with what followed the match.
    end_R1 = texts.lengths[slot_R1]
    period_RP1 = jnp.maximum(end_R1 + guessed - 1 - place_RP, 1)[:, :, None]
    place_RPC = place_RP[:, :, None] + 1 + step_C % period_RP1
    tokens = texts.text[slot_R1[:, :, None], jnp.clip(place_RPC, 0, S - 1)]
    for number in range(guessed):
        is_guess_RPC = place_RPC == end_R1[:, :, None] + number
        tokens = jnp.where(is_guess_RPC, guesses_RG[:, number, None, None], tokens)
    if not ring:
        return tokens
    beyond_RP1 = (place_RP >= S)[:, :, None]
    ring_RPC = texts.history[(place_RP[:, :, None] - S + 1 + step_C) % ring]
    # Nothing follows the end of a text.
    going_RPC = jnp.cumprod(ring_RPC != NOBODY, axis=2) > 0
    ring_RPC = jnp.where(going_RPC, ring_RPC, NOBODY)
    return jnp.where(beyond_RP1, ring_RPC, tokens)


def tail(texts: Texts, lengths_B: jax.Array, longest: int) -> jax.Array:
    """The last tokens [B, n] up to the root, NOBODY before the beginning.

    Args:
      texts: so far.
      lengths_B: int32, position of the root.
      longest: n.
    """
    position_Bn = lengths_B[:, None] + jnp.arange(1 - longest, 1)
    tokens = jnp.take_along_axis(texts.text, jnp.maximum(position_Bn, 0), axis=1)
    return jnp.where(position_Bn >= 0, tokens, NOBODY)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branching:
    """What may follow the nodes of a level, by matches that their paths agree with.

    Attributes:
      tokens: int32 [B, P], what each match says at this depth.
      first: bool [B, W, P], whether no earlier match of the node says the same.
      share: float32 [B, W, P], of the matches' weight that says the same.
      length: int32 [B, W], of the longest match there, with the path; 0 for none.
    """

    tokens: jax.Array
    first: jax.Array
    share: jax.Array
    length: jax.Array


def branch(matches: Matches, agrees_BWP: jax.Array, depth: int) -> Branching:
    """The continuations of matches, merged in a trie and counted.

    Longer matches weigh more, by GAIN for each token.

    Args:
      matches: of the root.
      agrees_BWP: bool, which of them a node's path follows.
      depth: of the nodes.
    """
    node = _branch(matches.following[:, :, depth], matches.lengths, agrees_BWP)
    length = jnp.where(node.length > 0, node.length + depth, 0)
    return dataclasses.replace(node, length=length)


# Traced once for all levels of one width.
@jax.jit
def _branch(tokens_BP, lengths_BP, agrees_BWP) -> Branching:
    """The same with the lengths at the roots."""
    agrees_BWP &= ((lengths_BP > 0) & (tokens_BP != NOBODY))[:, None]
    length_BWP = jnp.where(agrees_BWP, lengths_BP[:, None], 0)
    longest_BW1 = jnp.max(length_BWP, axis=2, keepdims=True)
    weight_BWP = jnp.where(agrees_BWP, GAIN ** (length_BWP - longest_BW1), 0.0)
    same_BPP = tokens_BP[:, :, None] == tokens_BP[:, None]
    number = jnp.arange(tokens_BP.shape[1])
    earlier_BPP = same_BPP & (number < number[:, None])
    repeats_BWP = jnp.any(earlier_BPP[:, None] & agrees_BWP[:, :, None], axis=3)
    said_BWP = jnp.sum(
        jnp.where(same_BPP[:, None], weight_BWP[:, :, None], 0.0), axis=3
    )
    total_BW1 = jnp.maximum(jnp.sum(weight_BWP, axis=2, keepdims=True), 1e-30)
    return Branching(
        tokens=tokens_BP,
        first=agrees_BWP & ~repeats_BWP,
        share=said_BWP / total_BW1,
        length=longest_BW1[:, :, 0],
    )


def guess(matches: Matches, rates: Rates, nodes, scratch):
    """What `sources.Source.guess` gives, of the trie of some matches.

    Args:
      matches: of the roots.
      rates: of matches by length.
      nodes: `sources.Nodes`.
      scratch: bool [B, E, P], the matches that each node expanded before agrees with.
    """
    B, W = nodes.tokens.shape
    P = matches.lengths.shape[1]
    if scratch is None:
        agrees_BWP = agrees_BEP = jnp.ones((B, W, P), bool)
    else:
        said_B1P = matches.following[:, None, :, nodes.depth - 1]
        agrees_BWP = scratch[jnp.arange(B)[:, None], nodes.parents]
        agrees_BWP &= said_B1P == nodes.tokens[:, :, None]
        agrees_BEP = jnp.concatenate([scratch, agrees_BWP], axis=1)
    node = branch(matches, agrees_BWP, nodes.depth)
    log_BW1 = rates.log(cell_of(node.length))[:, :, None]
    log_BWP = jnp.where(node.first, jnp.log(node.share) + log_BW1, -jnp.inf)
    return jnp.broadcast_to(node.tokens[:, None], log_BWP.shape), log_BWP, agrees_BEP


def cell_of(length: jax.Array) -> jax.Array:
    """int32 cell of `Rates` for lengths of matches; 0 for none, too."""
    return sum((length >= least).astype(jnp.int32) for least in LENGTHS[1:])


def start_rates() -> Rates:
    """Of matches by their lengths."""
    return Rates.start(PRIOR)


def observe(
    rates: Rates, matches: Matches, committed: Committed, first: int = 0
) -> Rates:
    """With whether matches of the last step named the tokens that came.

    Args:
      rates: by `cell_of` the longest match at a node.
      matches: of the roots before the step.
      committed: a step's.
      first: depth from which on it counts.
    """
    following_BC, columns = committed.following, matches.following.shape[2]
    agrees_B1P = (matches.lengths > 0)[:, None]
    for depth in range(min(columns, following_BC.shape[1])):
        node = branch(matches, agrees_B1P, depth)
        real_B1 = (depth < committed.count)[:, None] & (node.length > 0)
        right_B1P = node.tokens[:, None] == following_BC[:, depth, None, None]
        right_B1P &= agrees_B1P
        hit_B1 = jnp.any(right_B1P, axis=2)
        if depth >= first:
            rates = rates.after(cell_of(node.length), hit_B1, real_B1)
        agrees_B1P = right_B1P & real_B1[:, :, None]
    return rates
