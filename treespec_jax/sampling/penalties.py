"""Penalties and logit bias: the part of a policy that looks at the text so far.

Per token v, of the model's logit z[v]:

1. repetition r: z / r if z > 0, z · r if not, where v stands in the prompt or in the
   output (CTRL, Keskar et al. 1909.05858, in the form that Hugging Face and vLLM have);
2. frequency f and presence s: z - f · n - s · [n > 0], n times that v was *emitted*;
   the prompt does not count (OpenAI, vLLM);
3. the bias of v, whatever was seen.

Temperature and truncation come after that. At a node of a tree the output is what was
emitted and then the node's own path, so that a node gets the logits that plain decoding
would have there. Nothing here runs, or is compiled, before a request asks for it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextSoFar:
    """What the host knows of each slot at the start of a dispatch.

    Attributes:
      repetition: float32 [B], 1 is none.
      presence: float32 [B].
      frequency: float32 [B].
      bias_tokens: int32 [B, MAX_LOGIT_BIAS], padded with a number past the vocabulary.
      bias: float32 [B, MAX_LOGIT_BIAS], of those tokens.
      tokens: int32 [B, max_len], prompt and output, padded likewise.
      prompt_length: int32 [B].
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    bias_tokens: jax.Array
    bias: jax.Array
    tokens: jax.Array
    prompt_length: jax.Array

    def tables(self, vocab: int) -> Penalties:
        """The same, by token."""
        batch, length = self.tokens.shape
        slot_B1 = jnp.arange(batch)[:, None]
        emitted_BS = jnp.arange(length) >= self.prompt_length[:, None]
        zeros_VB = jnp.zeros((vocab, batch), jnp.int32)

        def count(marked_BS):
            marks = marked_BS.astype(jnp.int32)
            return zeros_VB.at[self.tokens, slot_B1].add(marks, mode="drop")

        bias_VB = jnp.zeros((vocab, batch), jnp.float32)
        return Penalties(
            repetition=self.repetition,
            presence=self.presence,
            frequency=self.frequency,
            bias=bias_VB.at[self.bias_tokens, slot_B1].add(self.bias, mode="drop"),
            prompt=count(~emitted_BS) > 0,
            emitted=count(emitted_BS),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """Of every slot; `emitted` grows from step to step.

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

    def after(self, emitted_BC: jax.Array, count_B: jax.Array) -> Penalties:
        """With the first `count` tokens of a step."""
        slot_B1 = jnp.arange(emitted_BC.shape[0])[:, None]
        kept_BC = jnp.arange(emitted_BC.shape[1]) < count_B[:, None]
        more = kept_BC.astype(jnp.int32)
        emitted = self.emitted.at[emitted_BC, slot_B1].add(more, mode="drop")
        return dataclasses.replace(self, emitted=emitted)

    def apply(
        self, logits_VR: jax.Array, tokens_BE: jax.Array, on_path_BWE: jax.Array
    ) -> jax.Array:
        """Logits [V, R] of nodes [B, W] under the penalties.

        Args:
          logits_VR: float32, R = B·W columns, B major; a drafter's may have fewer rows
            than the vocabulary.
          tokens_BE: int32, tokens of E nodes below the root.
          on_path_BWE: bool, which of them lie between the root and a node, itself
            included. The root's own token is one of the text so far.
        """
        vocab = logits_VR.shape[0]
        batch, width, count = on_path_BWE.shape
        shape = vocab, batch, width
        prompt, emitted, bias = (
            x[:vocab, :, None] for x in (self.prompt, self.emitted, self.bias)
        )
        if count:
            path = jnp.zeros(shape, jnp.int32)
            slot = jnp.arange(batch)[:, None, None]
            emitted += path.at[
                tokens_BE[:, None], slot, jnp.arange(width)[:, None]
            ].add(on_path_BWE.astype(jnp.int32), mode="drop")
        repetition, presence, frequency = (
            x[:, None] for x in (self.repetition, self.presence, self.frequency)
        )
        logits = logits_VR.reshape(shape)
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(prompt | (emitted > 0), scaled, logits)
        logits -= frequency * emitted + jnp.where(emitted > 0, presence, 0.0)
        return (logits + bias).reshape(logits_VR.shape)
