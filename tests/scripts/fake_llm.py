"""An `LLM` that makes up its answers, for tests of what surrounds it."""

from __future__ import annotations

import contextlib
import types

import numpy as np

from treespec_jax.completions import Completion
from treespec_jax.config import EngineConfig
from treespec_jax.engine.stats import Stats


class FakeLLM:
    """Continues any text by as many letters as were asked for, at a fixed pace.

    Attributes:
      asked: prompts of all calls of all of them, but for those that compile.
      stop_after: an interrupt comes at this call.
    """

    asked: list[str] = []
    stop_after = 10**9
    notes = ()
    dtype = weights = "float32"

    def __init__(self, settings):
        config = settings.engine
        config = EngineConfig(max_batch=config.max_batch, max_len=config.max_len)
        arrays = [np.zeros(10, np.float32)]
        self.engine = types.SimpleNamespace(
            config=config,
            program=lambda: (None, (arrays, arrays, None)),
            compile=lambda *programs, **options: None,
            is_new=True,
            measure_costs=lambda **options: 0.0,
        )
        self.drafter = types.SimpleNamespace(tau=0.7)
        self.size = 1 if settings.plain else 2

    def exclusive(self):
        return contextlib.nullcontext(self.engine)

    def reset(self):
        pass

    def generate(self, prompts, params, max_steps=None):
        params = params if isinstance(params, list) else [params] * len(prompts)
        return [self._one(p, s) for p, s in zip(prompts, params, strict=True)]

    def _one(self, prompt, params):
        if isinstance(prompt, str):
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
        count = params.max_tokens
        arrivals = [
            (0.1 * step, self.size) for step in range(1, count // self.size + 1)
        ]
        stats = Stats(
            prompt_tokens=1,
            tokens=count,
            steps=len(arrivals),
            drafted=len(arrivals) * (self.size - 1),
            emitted_counts=[0] * self.size + [len(arrivals)],
            prefill_seconds=0.01,
        )
        return Completion(
            prompt=prompt,
            prompt_token_ids=[5],
            text="x" * count,
            token_ids=[5] * count,
            finish_reason="length",
            logprobs=None,
            top_logprobs=None,
            prompt_logprobs=None,
            prompt_top_logprobs=None,
            seed=0,
            stats=stats,
            arrivals=arrivals,
        )
