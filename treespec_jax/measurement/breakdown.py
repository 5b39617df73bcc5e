"""Parts of a step of several `LLM`s, and the cost of T nodes, as lines of a journal."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM
from treespec_jax.measurement import step_cost
from treespec_jax.measurement.grid import Combination
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.machine import ReadBandwidth
from treespec_jax.models.transformer import Transformer

# The journal's kinds of lines.
STEP, CURVE, BANDWIDTH = "step", "curve", "bandwidth"
# Measurements of each program.
ROUNDS = 7


def step_cell(program: Combination) -> dict[str, Any]:
    """What names the line of a program's step."""
    names = "method", "shape", "rule", "batch", "weights"
    return {name: getattr(program, name) for name in names}


def curve_cell(program: Combination) -> dict[str, Any]:
    """What names the line of the cost of T nodes."""
    return {name: getattr(program, name) for name in ("batch", "weights")}


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """What is taken apart.

    Attributes:
      llms: by `Combination.program`, warm.
      targets: by `Combination.weights`.
      prompt: token ids of a text.
      emitted: tokens that follow it.
      params: how to sample.
    """

    llms: Mapping[Combination, LLM]
    targets: Mapping[str, Transformer]
    prompt: list[int]
    emitted: list[int]
    params: SamplingParams

    def run(self, journal: Journal, progress: Callable[[str], None]) -> None:
        """Measures what the journal lacks; `progress` is told before each."""
        bandwidth = ReadBandwidth()
        bandwidth.sample()
        for program, llm in self.llms.items():
            cell = step_cell(program)
            if journal.find(STEP, cell) is None:
                progress(f"taking {program.label} apart, batch {program.batch}")
                journal.add(STEP, [(cell, self._step(llm, program))])
                bandwidth.sample()
        for program, llm in self.llms.items():
            cell = curve_cell(program)
            if program.plain and journal.find(CURVE, cell) is None:
                progress(f"cost of more nodes: {program.label}, batch {program.batch}")
                journal.add(CURVE, [(cell, {"points": self._curve(llm, program)})])
                bandwidth.sample()
        cell = {"number": len(journal.all(BANDWIDTH))}
        values = {"samples": bandwidth.samples, "method": bandwidth.method}
        journal.add(BANDWIDTH, [(cell, values)])

    def _step(self, llm: LLM, program: Combination) -> dict[str, Any]:
        prefix = step_cost.middle_of(llm, self.prompt, self.emitted)
        target = self.targets[program.weights]
        cost = step_cost.step_cost(llm.engine, target, prefix, self.params, ROUNDS)
        weights = step_cost.weight_bytes(target)
        return {**dataclasses.asdict(cost), "target_weight_bytes": weights}

    def _curve(self, llm: LLM, program: Combination) -> list[dict[str, Any]]:
        config = llm.engine.config
        length = len(self.prompt) + len(self.emitted) // 2
        length = min(length, config.max_len - 1)
        target = self.targets[program.weights]
        return step_cost.cost_curve(target, config, length, ROUNDS)


def is_done(programs, journal: Journal) -> bool:
    """Whether the journal has all that `Breakdown` would measure of some programs."""
    return journal.find(BANDWIDTH, {"number": 0}) is not None and all(
        journal.find(STEP, step_cell(program)) is not None
        and (not program.plain or journal.find(CURVE, curve_cell(program)) is not None)
        for program in programs
    )


def results(journal: Journal) -> dict[str, Any] | None:
    """What was measured, as plain values for JSON; None if nothing was.

    A step's share of the bandwidth is what reading the weights once takes at full
    bandwidth over the time of the target's pass.
    """
    steps, readings = journal.all(STEP), journal.all(BANDWIDTH)
    if not steps or not readings:
        return None
    samples = [sample for reading in readings for sample in reading["samples"]]
    best = max(samples)
    for step in steps:
        read_seconds = step["target_weight_bytes"] / best
        step["bandwidth_share"] = read_seconds / step["target"]
        step["bandwidth_share_whole"] = read_seconds / step["step"]
    return {
        "steps": steps,
        "cost_curves": journal.all(CURVE),
        "bandwidth": {
            "bytes_per_second": best,
            "median": statistics.median(samples),
            "method": readings[0]["method"],
            "samples": samples,
        },
    }
