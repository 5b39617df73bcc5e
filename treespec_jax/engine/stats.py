"""Counts and times of a run, per request and summed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.config import SamplingParams
from treespec_jax.trees.records import StepRecord


@dataclasses.dataclass
class Stats:
    """What decoding did.

    Attributes:
      requests: finished or running requests counted here.
      prompt_tokens: tokens of their prompts.
      tokens: tokens emitted; up to the one that completed a stop text, if one did.
      steps: steps that emitted them.
      drafted: nodes, over all steps.
      rule: which drafted tokens were kept.
      cascade: the policy, if it was not the target's.
      alpha: of the cascade.
      adaptive_temperature: of the policy, `SamplingParams.adaptive_temperature`.
      cache_dtype: of keys and values; "int8" rounds them.
      bound_by: names of the budgets that were reached: `max_nodes_per_level` and
        `max_total_nodes` where they made trees smaller, `max_time`.
      emitted_counts: entry n counts the steps that emitted n tokens (n - 1 accepted).
      rank_counts: entry n counts the accepted nodes that were child n of their parent,
        in the order of the tree: of falling estimate, or as they were sampled.
      sources: names of where nodes can come from.
      source_counts: accepted nodes that came from each.
      restarts: times that a request lost its pages to older ones and was computed
        anew later.
      prefix_hits: times that the beginning of a text was found in the cache.
      shared_pages: pages that were found so, and did not have to be computed.
      evictions: pages of texts that had ended that were lost to make room.
      prefill_seconds: wall time of prefill.
      decode_seconds: wall time of decoding; requests of a batch overlap, so a sum over
        requests is not the wall time of the batch.
      compile_seconds: wall time for which the above stood still, while programs were
        compiled or read from the disk cache; of a request, while it held a slot.
    """

    requests: int = 1
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    rule: str = "exact"
    cascade: str = ""
    alpha: float = 0.0
    cache_dtype: str = ""
    adaptive_temperature: str = ""
    bound_by: tuple[str, ...] = ()
    emitted_counts: list[int] = dataclasses.field(default_factory=list)
    rank_counts: list[int] = dataclasses.field(default_factory=list)
    sources: tuple[str, ...] = ()
    source_counts: list[int] = dataclasses.field(default_factory=list)
    restarts: int = 0
    prefix_hits: int = 0
    shared_pages: int = 0
    evictions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0

    def begin(self, speculation: Any, cache_dtype: str, params: SamplingParams) -> None:
        """Notes how a request will be decoded, by a `speculation.Speculation`."""
        self.rule, self.cache_dtype = speculation.rule.name, cache_dtype
        self.adaptive_temperature = params.adaptive_temperature
        if speculation.cascade:
            self.cascade = speculation.cascade.name
            self.alpha = speculation.cascade.alpha
        self.sources = speculation.drafter.sources
        if params.speculate:
            self.bound_by = speculation.bound_by
        self.emitted_counts = [0] * (speculation.depth + 2)

    def record_step(self, step: StepRecord, times: int = 1) -> None:
        """Counts a step, or so many that did the same."""
        self._count(step, times)

    def take_back(self, step: StepRecord) -> None:
        """Undoes `record_step`."""
        self._count(step, -1)

    def _count(self, step, times):
        self.steps += times
        self.tokens += times * step.emitted
        self.drafted += times * step.nodes
        self.emitted_counts[step.emitted] += times
        for counts, numbers in (
            (self.rank_counts, step.ranks),
            (self.source_counts, step.sources),
        ):
            for number in numbers:
                counts += [0] * (number + 1 - len(counts))
                counts[number] += times
            while counts and not counts[-1]:
                counts.pop()

    @property
    def lossless(self) -> bool:
        """Whether tokens are distributed as in plain decoding with unrounded keys."""
        label = compatibility.label(self.rule, self.cascade, self.cache_dtype)
        return label == "lossless" and not self.adaptive_temperature

    @property
    def label(self) -> str:
        """How texts were sampled, for tables."""
        label = compatibility.label(self.rule, self.cascade)
        if self.cache_dtype == "int8":
            label = "lossy: int8 cache"
        if self.adaptive_temperature:
            label = f"lossy: temperature {self.adaptive_temperature}"
        if self.cascade:
            return f"{self.rule} ({label}: cascade {self.cascade}, {self.alpha:g})"
        return f"{self.rule} ({label})"

    @property
    def nodes_per_step(self) -> float:
        """Mean drafted nodes."""
        return self.drafted / self.steps if self.steps else 0.0

    @property
    def accepted(self) -> int:
        """Drafted nodes that were kept: every emitted token but one per step."""
        return self.tokens - self.steps

    @property
    def tokens_per_step(self) -> float:
        """Mean emitted tokens per step, the bonus included."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second of decoding, without compiling."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of steps that accepted a node at depth 1, 2, …, C."""
        if not self.steps:
            return []
        return [
            sum(self.emitted_counts[depth + 1 :]) / self.steps
            for depth in range(1, len(self.emitted_counts) - 1)
        ]

    @property
    def acceptance_by_rank(self) -> list[float]:
        """Share of accepted nodes that were the first, second, … child."""
        counts = self.rank_counts
        return [count / self.accepted for count in counts] if self.accepted else []

    @property
    def accepted_by_source(self) -> dict[str, int]:
        """Accepted nodes by the name of where they came from."""
        counts = dict.fromkeys(self.sources, 0)
        return counts | dict(zip(self.sources, self.source_counts, strict=False))

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived figures, for JSON."""
        return {
            "bound_by": list(self.bound_by),
            **{
                name: getattr(self, name)
                for name in (
                    "rule",
                    "cascade",
                    "alpha",
                    "cache_dtype",
                    "lossless",
                    "requests",
                    "prompt_tokens",
                    "tokens",
                    "steps",
                    "drafted",
                    "accepted",
                    "tokens_per_step",
                    "acceptance_by_depth",
                    "acceptance_by_rank",
                    "accepted_by_source",
                    "restarts",
                    "prefix_hits",
                    "shared_pages",
                    "evictions",
                    "prefill_seconds",
                    "decode_seconds",
                    "compile_seconds",
                    "tokens_per_second",
                )
            },
        }


def total(
    parts: Iterable[Stats],
    prefill_seconds: float,
    decode_seconds: float,
    compile_seconds: float = 0.0,
) -> Stats:
    """Sums the counts of several requests; times are the batch's wall times."""
    parts = list(parts)
    return Stats(
        requests=len(parts),
        prompt_tokens=sum(p.prompt_tokens for p in parts),
        tokens=sum(p.tokens for p in parts),
        steps=sum(p.steps for p in parts),
        drafted=sum(p.drafted for p in parts),
        rule=parts[0].rule if parts else "exact",
        cascade=parts[0].cascade if parts else "",
        alpha=parts[0].alpha if parts else 0.0,
        cache_dtype=parts[0].cache_dtype if parts else "",
        # One text that has it makes the whole lossy.
        adaptive_temperature=max((p.adaptive_temperature for p in parts), default=""),
        bound_by=tuple(dict.fromkeys(n for p in parts for n in p.bound_by)),
        emitted_counts=_summed(p.emitted_counts for p in parts),
        rank_counts=_summed(p.rank_counts for p in parts),
        sources=parts[0].sources if parts else (),
        source_counts=_summed(p.source_counts for p in parts),
        restarts=sum(p.restarts for p in parts),
        prefix_hits=sum(p.prefix_hits for p in parts),
        shared_pages=sum(p.shared_pages for p in parts),
        evictions=sum(p.evictions for p in parts),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_seconds,
    )


def _summed(counts: Iterable[Sequence[int]]) -> list[int]:
    """Entry by entry; lists may differ in length."""
    return [sum(entries) for entries in itertools.zip_longest(*counts, fillvalue=0)]
