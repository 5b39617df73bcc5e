"""Tokens that a request forbids, and its own functions of text and logits.

Parts of `sampling.penalties.Penalties`. A forbidden token's logit is -inf:

* `Masks`: a token outside `allowed_token_ids`, or that is a bad word by itself; and a
  token that ends the text, while fewer than `min_tokens` were emitted;
* `BadWords`: the last token of a bad word of several, where the text ends with the
  others (the prompt counts, as in Hugging Face's NoBadWordsLogitsProcessor);
* `Processors`: whatever the request's functions make of the logits.

All see the text that plain decoding would have at a node: that before the step, and
then the tokens on the node's path.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from treespec_jax.checks import shown
from treespec_jax.errors import UserError

# Of tokens so far [S] and logits [V] to logits [V].
Processor = Callable[[jax.Array, jax.Array], jax.Array]
# In front of a text's first token.
NOTHING = -1
# Stands in a bad word for any token; no token and not `NOTHING`.
ANY = -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Sets of tokens, a bit for each, the lowest first.

    Attributes:
      allowed: uint32 [B, ceil(V / 32)].
      ends: uint32 [B, ceil(V / 32)], tokens that end a text.
      min_tokens: int32 [B], tokens to emit before one of these.
    """

    allowed: jax.Array
    ends: jax.Array
    min_tokens: jax.Array

    def apply(self, logits_VBW: jax.Array, count_BW: jax.Array) -> jax.Array:
        """Logits of nodes after which `count` tokens will have been emitted."""
        early_BW = count_BW < self.min_tokens[:, None]
        allowed_VB1, ends_VB1 = (
            _bits(bits, logits_VBW.shape[0])[:, :, None]
            for bits in (self.allowed, self.ends)
        )
        return jnp.where(allowed_VB1 & ~(ends_VB1 & early_BW), logits_VBW, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BadWords:
    """Runs of two tokens or more that may not come about.

    Attributes:
      start: int32 [B, M, L - 1], all tokens of a word but the last, with `ANY` in
        front of the shorter ones.
      last: int32 [B, M], the last token; past the vocabulary where there is no word.
    """

    start: jax.Array
    last: jax.Array

    @property
    def reach(self) -> int:
        """Tokens of the text that are looked at."""
        return self.start.shape[2]

    def apply(self, logits_VBW: jax.Array, text_BWS: jax.Array) -> jax.Array:
        """Logits of nodes after texts that are long enough."""
        end_BW1L = text_BWS[:, :, None, text_BWS.shape[2] - self.reach :]
        start_B1ML = self.start[:, None]
        begun_BWM = jnp.all((start_B1ML == ANY) | (start_B1ML == end_BW1L), axis=3)
        B, W, _ = begun_BWM.shape
        last_BWM = jnp.broadcast_to(self.last[:, None], begun_BWM.shape)
        return logits_VBW.at[
            last_BWM,
            jnp.arange(B)[:, None, None],
            jnp.arange(W)[:, None],
        ].add(jnp.where(begun_BWM, -jnp.inf, 0.0), mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Processors:
    """Functions of the requests; a program is compiled for every combination of them.

    Attributes:
      which: int32 [B], the slot's number in `chains`; -1: none.
      chains: what requests give, functions that are applied in turn.
    """

    which: jax.Array
    chains: tuple[tuple[Processor, ...], ...] = dataclasses.field(
        metadata=dict(static=True)
    )

    def apply(self, logits_VBW: jax.Array, text_BWS: jax.Array, vocab: int):
        """Logits of nodes after texts.

        Args:
          logits_VBW: of a drafter there may be fewer than the vocabulary has; the
            functions then see -inf for the others.
          text_BWS: int32, `NOTHING` in front of the first token.
          vocab: V.
        """
        rows = logits_VBW.shape[0]
        lacking = (0, vocab - rows), (0, 0), (0, 0)
        logits = jnp.pad(logits_VBW, lacking, constant_values=-jnp.inf)
        for number, chain in enumerate(self.chains):
            changed = logits
            for function in chain:
                each = jax.vmap(jax.vmap(function, (0, 1), 1), (0, 1), 1)
                changed = each(text_BWS, changed).astype(jnp.float32)
            logits = jnp.where((self.which == number)[:, None], changed, logits)
        return logits[:rows]


def check(chain: Sequence[Processor], length: int, vocab: int) -> None:
    """Raises UserError for a function that does not take tokens and logits to logits.

    Args:
      chain: functions that are applied in turn; nothing of them runs.
      length: of the tokens.
      vocab: V.
    """
    for function in chain:
        _check_processor(function, length, vocab)


@functools.lru_cache(maxsize=64)
def _check_processor(function: Processor, length: int, vocab: int) -> None:
    name = getattr(function, "__name__", type(function).__name__)
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    logits = jax.ShapeDtypeStruct((vocab,), jnp.float32)
    try:
        found = jax.eval_shape(function, tokens, logits)
    except Exception as error:
        raise UserError(
            f"logits processor {name} fails when jax traces it: "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
    shape = getattr(found, "shape", None)
    kind = getattr(found, "dtype", jnp.dtype(bool))
    if shape != (vocab,) or not jnp.issubdtype(kind, jnp.floating):
        raise UserError(
            f"logits processor {name} must return {vocab} logits, got {shown(found)}"
        )


def texts_at(
    text_BS: jax.Array, tokens_BE: jax.Array, on_path_BWE: jax.Array
) -> jax.Array:
    """The last S tokens [B, W, S] of the text at nodes, the newest last.

    Args:
      text_BS: int32, before the step.
      tokens_BE: int32, of nodes below the root, parents before their children.
      on_path_BWE: bool, which of them lie between the root and a node.
    """
    B, W, E = on_path_BWE.shape
    S = text_BS.shape[1]
    depth_BW1 = jnp.sum(on_path_BWE, axis=2, dtype=jnp.int32)[:, :, None]
    shifted = jnp.minimum(jnp.arange(S) + depth_BW1, S - 1)
    text = jnp.take_along_axis(text_BS[:, None], shifted, axis=2)
    if not E:
        return text
    rank_BWE = jnp.cumsum(on_path_BWE, axis=2, dtype=jnp.int32)
    column_BWE = S - 1 - (depth_BW1 - rank_BWE)
    # Those before the last S, and those off the path, are dropped.
    column_BWE = jnp.where(on_path_BWE & (column_BWE >= 0), column_BWE, S)
    return text.at[
        jnp.arange(B)[:, None, None], jnp.arange(W)[:, None], column_BWE
    ].set(jnp.broadcast_to(tokens_BE[:, None], on_path_BWE.shape), mode="drop")


def _bits(bits_BI: jax.Array, count: int) -> jax.Array:
    """bool [count, B], the lowest bit of the first number first."""
    bits_BIJ = (bits_BI[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BIJ.reshape(bits_BI.shape[0], -1)[:, :count].T.astype(bool)
