"""An `LLM` as a decoder of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM
from treespec_jax.measurement import step_cost
from treespec_jax.measurement.decoders import Answer


class EngineDecoder:
    """See `decoders.Decoder`.

    Args:
      llm: answers.
      options: further variables of its chat template.
    """

    def __init__(self, llm: LLM, options: Mapping[str, Any]):
        self.llm = llm
        self._options = options

    @property
    def memory_bytes(self) -> int:
        """Weights of both models, cache and the drafter's state."""
        _, (weights, state, _) = self.llm.engine.program()
        return sum(leaf.nbytes for leaf in jax.tree.leaves((weights, state)))

    def warm_up(self, params: SamplingParams) -> None:
        chunks = self.llm.engine.config.prefill_chunks
        step_cost.warm_up(self.llm, [[0] * (size + 1) for size in chunks], params)

    def reset(self) -> None:
        self.llm.reset()

    def answer(self, turns, params, streaming=False):
        prompts, steps = [turn.prompt for turn in turns], 1 if streaming else None
        if isinstance(prompts[0], str):
            generation = self.llm.generate(prompts, params, steps)
        else:
            generation = self.llm.chat(prompts, params, self._options, steps)
        return [
            Answer(c.text, c.token_ids, c.arrivals, c.stats, c.records)
            for c in generation
        ]
