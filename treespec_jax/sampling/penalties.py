"""The part of a policy that looks at the text so far: penalties, bias, constraints.

Per token v, of the model's logit z[v]:

1. repetition r: z / r if z > 0, z · r if not, where v stands in the prompt or in the
   output (CTRL, Keskar et al. 1909.05858, in the form that Hugging Face and vLLM have);
2. frequency f and presence s: z - f · n - s · [n > 0], n times that v was *emitted*;
   the prompt does not count (OpenAI, vLLM);
3. the bias of v, whatever was seen;
4. the request's own functions, then what it forbids (`sampling.constraints`).

Temperature and truncation come after that. At a node of a tree the output is what was
emitted and then the node's own path, so that a node gets the logits that plain decoding
would have there. Nothing here runs, or is compiled, before a request asks for it; each
of `Repeats`, `Masks`, `BadWords` and `Processors` is then a part of the program only if
some request of the batch needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from treespec_jax.sampling.constraints import (
    NOTHING,
    BadWords,
    Masks,
    Processors,
    texts_at,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepeatSettings:
    """What each slot's request asked for.

    Attributes:
      repetition: float32 [B], 1 is none.
      presence: float32 [B].
      frequency: float32 [B].
      bias_tokens: int32 [B, MAX_LOGIT_BIAS], padded with a number past the vocabulary.
      bias: float32 [B, MAX_LOGIT_BIAS], of those tokens.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    bias_tokens: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextSoFar:
    """What the host knows of each slot at the start of a dispatch.

    Attributes:
      tokens: int32 [B, max_len], prompt and output, padded with a number past the
        vocabulary.
      prompt_length: int32 [B].
      length: int32 [B], of prompt and output.
      repeats: None if no request has a penalty or a bias.
      masks: None if no request has one; so are those that follow.
      bad_words: of two tokens or more.
      processors: functions of requests.
    """

    tokens: jax.Array
    prompt_length: jax.Array
    length: jax.Array
    repeats: RepeatSettings | None = None
    masks: Masks | None = None
    bad_words: BadWords | None = None
    processors: Processors | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TextSoFar:
        """Of `engine.slots.SlotSettings.text`: the parts are mappings too."""
        parts = {
            "repeats": RepeatSettings,
            "masks": Masks,
            "bad_words": BadWords,
            "processors": Processors,
        }
        made = {
            name: parts[name](**value) if name in parts and value is not None else value
            for name, value in fields.items()
        }
        return cls(**made)

    def tables(self, vocab: int) -> Penalties:
        """The same, by token."""
        return Penalties(
            emitted=self.length - self.prompt_length,
            text=self._newest(),
            repeats=None if self.repeats is None else self._repeats(vocab),
            masks=self.masks,
            bad_words=self.bad_words,
            processors=self.processors,
            vocab=vocab,
        )

    def _newest(self) -> jax.Array | None:
        """The last tokens [B, S], as many as somebody looks at; None: nobody does."""
        reach = 0 if self.bad_words is None else self.bad_words.reach
        if self.processors is not None:
            reach = max(reach, self.tokens.shape[1])
        if not reach:
            return None
        column_BS = self.length[:, None] - reach + jnp.arange(reach)
        text_BS = jnp.take_along_axis(self.tokens, jnp.maximum(column_BS, 0), axis=1)
        return jnp.where(column_BS >= 0, text_BS, NOTHING)

    def _repeats(self, vocab: int) -> Repeats:
        asked, (batch, length) = self.repeats, self.tokens.shape
        slot_B1 = jnp.arange(batch)[:, None]
        emitted_BS = jnp.arange(length) >= self.prompt_length[:, None]
        zeros_VB = jnp.zeros((vocab, batch), jnp.int32)

        def count(marked_BS):
            marks = marked_BS.astype(jnp.int32)
            return zeros_VB.at[self.tokens, slot_B1].add(marks, mode="drop")

        bias_VB = jnp.zeros((vocab, batch), jnp.float32)
        return Repeats(
            repetition=asked.repetition,
            presence=asked.presence,
            frequency=asked.frequency,
            bias=bias_VB.at[asked.bias_tokens, slot_B1].add(asked.bias, mode="drop"),
            prompt=count(~emitted_BS) > 0,
            emitted=count(emitted_BS),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeats:
    """Penalties and bias of every slot; `emitted` grows from step to step.

    Attributes:
      repetition: float32 [B].
      presence: float32 [B].
      frequency: float32 [B].
      bias: float32 [V, B].
      prompt: bool [V, B], whether the token stands in the prompt.
      emitted: int32 [V, B], times that it was emitted.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    bias: jax.Array
    prompt: jax.Array
    emitted: jax.Array

    def after(self, emitted_BC: jax.Array, count_B: jax.Array) -> Repeats:
        """With the first `count` tokens of a step."""
        slot_B1 = jnp.arange(emitted_BC.shape[0])[:, None]
        kept_BC = jnp.arange(emitted_BC.shape[1]) < count_B[:, None]
        more = kept_BC.astype(jnp.int32)
        emitted = self.emitted.at[emitted_BC, slot_B1].add(more, mode="drop")
        return dataclasses.replace(self, emitted=emitted)

    def apply(
        self, logits_VBW: jax.Array, tokens_BE: jax.Array, on_path_BWE: jax.Array
    ) -> jax.Array:
        """Logits of nodes; arguments as for `Penalties.apply`."""
        vocab, _, width = shape = logits_VBW.shape
        prompt, emitted, bias = (
            x[:vocab, :, None] for x in (self.prompt, self.emitted, self.bias)
        )
        if on_path_BWE.shape[2]:
            path = jnp.zeros(shape, jnp.int32)
            slot = jnp.arange(shape[1])[:, None, None]
            emitted += path.at[
                tokens_BE[:, None], slot, jnp.arange(width)[:, None]
            ].add(on_path_BWE.astype(jnp.int32), mode="drop")
        repetition, presence, frequency = (
            x[:, None] for x in (self.repetition, self.presence, self.frequency)
        )
        logits = logits_VBW
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(prompt | (emitted > 0), scaled, logits)
        logits -= frequency * emitted + jnp.where(emitted > 0, presence, 0.0)
        return logits + bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """All of it, of every slot; what counts tokens grows from step to step.

    Attributes:
      emitted: int32 [B], tokens so far.
      text: int32 [B, S], the newest tokens of prompt and output, the last one last;
        `constraints.NOTHING` in front of the first. None: nobody looks.
      repeats: None if nobody has any, like those that follow.
      masks: see `constraints`.
      bad_words: likewise.
      processors: likewise.
      vocab: V.
    """

    emitted: jax.Array
    text: jax.Array | None
    repeats: Repeats | None
    masks: Masks | None
    bad_words: BadWords | None
    processors: Processors | None
    vocab: int = dataclasses.field(metadata=dict(static=True))

    @property
    def forbids(self) -> bool:
        """Whether a logit may become -inf."""
        parts = self.masks, self.bad_words, self.processors
        return any(part is not None for part in parts)

    def after(self, emitted_BC: jax.Array, count_B: jax.Array) -> Penalties:
        """With the first `count` tokens of a step."""
        text = self.text
        if text is not None:
            more_BS = jnp.concatenate([text, emitted_BC], axis=1)
            column_BS = jnp.arange(text.shape[1]) + count_B[:, None]
            text = jnp.take_along_axis(more_BS, column_BS, axis=1)
        return dataclasses.replace(
            self,
            emitted=self.emitted + count_B,
            text=text,
            repeats=self.repeats and self.repeats.after(emitted_BC, count_B),
        )

    def apply(
        self, logits_VR: jax.Array, tokens_BE: jax.Array, on_path_BWE: jax.Array
    ) -> jax.Array:
        """Logits [V, R] of nodes [B, W] under all of it.

        Args:
          logits_VR: float32, R = B·W columns, B major; a drafter's may have fewer rows
            than the vocabulary.
          tokens_BE: int32, tokens of E nodes below the root, parents before their
            children.
          on_path_BWE: bool, which of them lie between the root and a node, itself
            included. The root's own token is one of the text so far.
        """
        batch, width, _ = on_path_BWE.shape
        logits = logits_VR.reshape(-1, batch, width)
        text_BWS = None
        if self.text is not None:
            text_BWS = texts_at(self.text, tokens_BE, on_path_BWE)
        if self.repeats is not None:
            logits = self.repeats.apply(logits, tokens_BE, on_path_BWE)
        if self.processors is not None:
            logits = self.processors.apply(logits, text_BWS, self.vocab)
        if self.bad_words is not None:
            logits = self.bad_words.apply(logits, text_BWS)
        if self.masks is not None:
            depth_BW = jnp.sum(on_path_BWE, axis=2, dtype=jnp.int32)
            logits = self.masks.apply(logits, self.emitted[:, None] + depth_BW)
        return logits.reshape(logits_VR.shape)

    def keep_forbidden(self, scores_VR: jax.Array, logits_VR: jax.Array) -> jax.Array:
        """Scores of a cascade without tokens that the target's logits forbid.

        Where the drafter had nothing else to propose, they are the target's.
        """
        if not self.forbids:
            return scores_VR
        scores_VR = jnp.where(logits_VR > -jnp.inf, scores_VR, -jnp.inf)
        return jnp.where(jnp.any(scores_VR > -jnp.inf, axis=0), scores_VR, logits_VR)

    def apply_to_draft(
        self, logits_VR: jax.Array, tokens_BE: jax.Array, on_path_BWE: jax.Array
    ) -> jax.Array:
        """The same of a drafter's logits.

        A column in which every token is forbidden stays as it was: a drafter may lack
        all tokens that are allowed, and has to propose something.
        """
        logits = self.apply(logits_VR, tokens_BE, on_path_BWE)
        if not self.forbids:
            return logits
        return jnp.where(jnp.any(logits > -jnp.inf, axis=0), logits, logits_VR)
