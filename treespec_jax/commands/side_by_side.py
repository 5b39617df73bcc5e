"""Decoding with trees against plain decoding, for `generate --compare`."""

from __future__ import annotations

import dataclasses
from typing import Any

# Timed runs of each way of decoding; the better one counts.
ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Compared:
    """Decoding with the tree and plainly, in turn.

    Attributes:
      llms: "plain" and "tree", as all else here.
      speeds: tokens per second of the better round.
      generations: of that round.
    """

    llms: dict[str, Any]
    speeds: dict[str, float]
    generations: dict[str, Any]


def compare(llms: dict[str, Any], prompts, params, options) -> Compared:
    """Decodes by `LLM`s that are compiled, all texts that are tried of each prompt."""
    from treespec_jax.measurement import rounds

    params = [dataclasses.replace(p, n=p.samples, best_of=None) for p in params]
    found = Compared(llms, dict.fromkeys(llms, 0.0), {})
    for _ in range(ROUNDS):
        for name, model in llms.items():
            generation, seconds = rounds.decode(model, prompts, params, options)
            speed = generation.stats.tokens / seconds
            if speed >= found.speeds[name]:
                found.speeds[name] = speed
                found.generations[name] = generation
    return found


def parts(compared: Compared, target, text, params) -> dict[str, float] | None:
    """Seconds of the parts of a step in the middle of a text, each timed apart.

    Args:
      compared: with the `LLM` that is timed.
      target: its target's model.
      text: token ids of a prompt, and of what follows.
      params: how to sample.
    """
    from treespec_jax.measurement import step_cost

    llm = compared.llms["tree"]
    prefix, engine = step_cost.middle_of(llm, *text), llm.engine
    longest = engine.config.steps_per_dispatch * (engine.speculation.depth + 1)
    if len(prefix) + longest >= engine.config.max_len:
        return None
    cost = step_cost.step_cost(engine, target, prefix, params, ROUNDS)
    rest = max(0.0, cost.step - cost.draft - cost.target)
    return {"draft": cost.draft, "target": cost.target, "rest": rest}
