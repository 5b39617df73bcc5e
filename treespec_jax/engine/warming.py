"""What is compiled before requests come, and settings of those that are in no slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.chooser import Chooser, Program
from treespec_jax.engine.costs import CATCH_UP, REHEARSAL, Load
from treespec_jax.engine.plan import ChunkPlan, Plan, idle_chunk
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import SlotSettings
from treespec_jax.trees.shapes import TreeShape


def programs(
    chooser: Chooser, shapes: Sequence[TreeShape], slots: int, waits: bool
) -> list[Program]:
    """Dispatches that a full batch, or one text, may use.

    Args:
      chooser: of the engine.
      shapes: that it chooses from; of an only one nothing else is compiled.
      slots: B.
      waits: whether tokens of plain steps wait for the drafter's model.
    """
    if len(shapes) == 1:
        return [*shapes]
    useful = {s for n in {1, slots} for s in chooser.useful(Load.of(n, 0))}
    more = [REHEARSAL, CATCH_UP] if waits else [REHEARSAL]
    return [*(shape for shape in shapes if shape in useful), *more]


def warm_up(engine: Any, request: Request) -> float:
    """Compiles all that a request's settings lead to, and learns what steps cost.

    The latter where no text has begun, which would forget what the drafter has learnt.

    Args:
      engine: `engine.Engine`.
      request: that has no slot.

    Returns:
      seconds that it took.
    """
    before = engine.compile_seconds
    engine.compile(engine.config.prefill_chunks, resuming=True, request=request)
    if engine.is_new:
        engine.measure_costs(params=request.params)
    return engine.compile_seconds - before


class Idle:
    """Plans, chunks and settings without a slot.

    Args:
      config: fixed sizes.
      eos_ids: tokens that end a text, unless a request ignores them.
      vocab_size: V.
    """

    def __init__(self, config: EngineConfig, eos_ids: Sequence[int], vocab_size: int):
        self._config, self._eos_ids = config, tuple(eos_ids)
        self._vocab_size = vocab_size

    def plans(self, plan: Plan, request: Request | None) -> list[Plan]:
        """Dispatches of all variants that a request's settings lead to.

        Args:
          plan: in which nobody runs.
          request: None: of such plans alone.
        """
        if request is None:
            return [plan]
        settings = self._settings(request.params)
        text = settings.text({}) if request.penalised else None
        if text is None and not settings.top:
            return [plan]
        return [plan, dataclasses.replace(plan, text=text, top=settings.top)]

    def chunks(
        self, sizes: Sequence[int], resuming: bool, request: Request | None
    ) -> list[ChunkPlan]:
        """Prefills of some sizes, and those that a request's settings ask for.

        Args:
          sizes: of `EngineConfig.prefill_chunks`.
          resuming: also what tells a drafter of cached beginnings.
          request: None: of any that asks for nothing.
        """
        chunks = [idle_chunk(size, self._config) for size in sizes]
        pieces = list(chunks)
        if resuming:
            largest = self._config.prefill_chunks[-1]
            pieces.append(idle_chunk(largest, self._config, cached=True))
        top = None
        if request is not None:
            top = self._settings(request.params).prompt_top(request)
        if top is not None:
            pieces += [dataclasses.replace(chunk, top=top) for chunk in chunks]
        return pieces

    def after(
        self, tokens: Sequence[int], prompt: int, params: SamplingParams
    ) -> dict[str, Any]:
        """How a token after a text is chosen: arguments of `Executor.scores`.

        Args:
          tokens: of the text, of which the first `prompt` are the prompt.
          prompt: tokens of it.
          params: of the request.
        """
        sizes = 1, self._config.max_len + 1
        settings = SlotSettings(*sizes, self._eos_ids, self._vocab_size)
        settings.insert(0, params)
        adaptive, text = settings.adaptive(), None
        if params.penalised or len(tokens) - prompt < params.min_tokens:
            text = settings.text({0: (tokens[:prompt], tokens[prompt:])})
        return {"sampling": settings.sampling(), "text": text, "adaptive": adaptive}

    def _settings(self, params: SamplingParams) -> SlotSettings:
        """As if a request with these had the first slot, and nobody the others."""
        sizes = self._config.max_batch, self._config.max_len
        settings = SlotSettings(*sizes, self._eos_ids, self._vocab_size)
        settings.insert(0, params)
        return settings
