"""Generation timed round by round: several `LLM`s on the same prompts, in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import Stats, total
from treespec_jax.measurement.timing import paired, rotated, spread
from treespec_jax.trees.records import TreeRecord
from treespec_jax.tuning import calibration

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass
class Run:
    """What one `LLM` did in one round.

    Attributes:
      stats: summed over the prompts; decoding by the clock on the wall.
      wall_steps: steps that ran, a step of a batch counted once.
      token_ids: of every prompt.
      records: of every drafted tree, if the `LLM` records them.
    """

    stats: Stats
    wall_steps: int
    token_ids: list[list[int]]
    records: list[TreeRecord]


def seeded(sampling: SamplingParams, count: int) -> list[SamplingParams]:
    """Settings of so many texts to measure: seeds that follow, and no early end."""
    return [
        dataclasses.replace(sampling.for_text(index), ignore_eos=True)
        for index in range(count)
    ]


def decode(llm, prompts, params, options=None, on_finish=None):
    """Generates; returns the `Generation` and seconds of all but prefill and compiling.

    By the clock on the wall, so that the host's work between dispatches counts.

    Args:
      llm: an `LLM`.
      prompts: texts and token ids, or conversations.
      params: for all of them, or each.
      options: further values for a chat template to see.
      on_finish: see `LLM.generate`.
    """
    began = time.perf_counter()
    if prompts and prompts[0] and isinstance(prompts[0][0], dict):
        generation = llm.chat(prompts, params, options, on_finish=on_finish)
    else:
        generation = llm.generate(prompts, params, on_finish=on_finish)
    seconds, stats = time.perf_counter() - began, generation.stats
    return generation, seconds - stats.prefill_seconds - stats.compile_seconds


def run_round(
    llms: Mapping[Name, Any],
    token_ids: Sequence[Sequence[int]],
    sampling: SamplingParams,
    number: int,
) -> dict[Name, Run]:
    """Every `LLM` on every prompt; who comes first changes from batch to batch.

    Args:
      llms: all of one batch size.
      token_ids: of the prompts.
      sampling: of all prompts; each has a seed of its own, see `seeded`.
      number: of the round.
    """
    names = list(llms)
    batch = llms[names[0]].engine.config.max_batch
    params = seeded(sampling, len(token_ids))
    parts = {name: [] for name in names}
    for turn, start in enumerate(range(0, len(token_ids), batch)):
        some = slice(start, start + batch)
        for name in rotated(names, number + turn):
            parts[name].append(decode(llms[name], token_ids[some], params[some]))
    return {name: _joined(*zip(*pairs, strict=True)) for name, pairs in parts.items()}


def _joined(generations, seconds) -> Run:
    completions = [c for generation in generations for c in generation]
    return Run(
        stats=total(
            [c.stats for c in completions],
            sum(g.stats.prefill_seconds for g in generations),
            sum(seconds),
            sum(g.stats.compile_seconds for g in generations),
        ),
        wall_steps=sum(max(c.stats.steps for c in g) for g in generations),
        token_ids=[c.token_ids for c in completions],
        records=[record for c in completions for record in c.records],
    )


def summary(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Figures of one `LLM` over all rounds, as plain values for JSON.

    Args:
      runs: one for each round.
      plain: those of plain decoding in the same rounds.
    """
    parts = [run.stats for run in runs]
    whole = total(parts, 0.0, 0.0)
    speeds = [stats.tokens_per_second for stats in parts]
    plain_speeds = [run.stats.tokens_per_second for run in plain]
    texts = zip(runs[0].token_ids, plain[0].token_ids, strict=True)
    return {
        "lossless": whole.lossless,
        "tokens_per_second": spread(speeds),
        "ratio_to_plain": spread(paired(speeds, plain_speeds)),
        "milliseconds_per_step": spread(
            [1e3 * run.stats.decode_seconds / run.wall_steps for run in runs]
        ),
        "prefill_seconds": spread([stats.prefill_seconds for stats in parts]),
        "tokens": whole.tokens,
        "steps": whole.steps,
        "nodes_per_step": whole.nodes_per_step,
        "tokens_per_step": spread([stats.tokens_per_step for stats in parts]),
        "acceptance_by_depth": whole.acceptance_by_depth,
        "acceptance_by_rank": whole.acceptance_by_rank,
        "accepted_by_source": whole.accepted_by_source,
        "reliability": reliability([r for run in runs for r in run.records]),
        # Of the first round.
        "texts_unlike_plain": sum(ours != theirs for ours, theirs in texts),
    }


def reliability(records: Sequence[TreeRecord]) -> dict[str, Any] | None:
    """How often the drafter's estimates came true; None without drafted trees."""
    if not any(len(record.parents) > 1 for record in records):
        return None
    rows = calibration.reliability(records)
    return {"bins": rows, "mean_gap": calibration.error(rows)}
