"""Texts from prompts, with a small table of how it went."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from treespec_jax.acceptance import compatibility
from treespec_jax.engine.stats import total
from treespec_jax.experiments import dialogue, models, runtime, table
from treespec_jax.experiments.prompts import Prompt
from treespec_jax.experiments.settings import Experiment

# Stands for what the user will say, to see that it can be answered.
_GREETING = [{"role": "user", "content": "Hello"}]
_SECONDS = ("prefill_seconds", "decode_seconds")
# Timed runs of each way of decoding in a comparison; the better one counts.
_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of scripts/generate.py.

    Attributes:
      settings: with their paths looked up.
      prompts: texts to continue, or conversations to answer.
      opening: messages in front of a conversation to hold on stdin, if there are no
        prompts.
      options: further values for the chat template to see.
      compare: also decode plainly and compare.
      as_json: print one JSON object instead of text.
      compilation_cache: see `runtime.set_up`.
      started: `time.perf_counter()` when the program began.
    """

    settings: Experiment
    prompts: Sequence[Prompt]
    opening: list[dict[str, Any]] | None = None
    options: dict[str, Any] | None = None
    compare: bool = False
    as_json: bool = False
    compilation_cache: str | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)


def run(job: Job, out: TextIO | None = None) -> None:
    """Loads, compiles, generates and prints.

    Raises:
      UserError: a checkpoint that cannot be read, a pair that does not fit together, or
        a prompt that does not fit max_len.
    """
    out = out or sys.stdout
    settings, params = _without_idle_slots(job), job.settings.sampling
    # Before jax starts and weights are read, so that a mistake is answered at once.
    prompts = list(job.prompts) or [[*job.opening, *_GREETING]]
    encoded = models.check(settings, prompts, [settings.tree], job.options)
    runtime.set_up(job.compilation_cache)
    began = time.perf_counter()
    pair = models.load_pair(settings)
    llm = models.make_llm(settings, pair, settings.tree)
    for note in llm.notes:
        print(f"note: {note}", file=sys.stderr)
    loaded = time.perf_counter()
    if not job.prompts:
        encoded = [[0] * (n + 1) for n in llm.engine.config.prefill_chunks]
    models.warm_up(llm, encoded)
    timing = {
        "load_seconds": loaded - began,
        "compile_seconds": time.perf_counter() - loaded,
    }
    shown = None if job.as_json else out
    if not job.prompts:
        prompts, completions = dialogue.hold(
            lambda messages: _stream(llm, messages, params, shown, job.options)[0],
            job.opening,
        )
        parts = [c.stats for c in completions]
        seconds = [sum(getattr(s, name) for s in parts) for name in _SECONDS]
        stats = total(parts, *seconds)
    elif len(prompts) == 1:
        completion, first = _stream(llm, prompts[0], params, shown, job.options)
        completions, stats = [completion], completion.stats
        timing["first_token_seconds"] = first - job.started
    else:
        generation, seconds = models.decode(llm, prompts, params, job.options)
        completions = list(generation)
        stats = dataclasses.replace(generation.stats, decode_seconds=seconds)
        if shown:
            _print_texts(completions, out)
    comparison = None
    if job.compare and prompts:
        comparison = _compare(job, settings, llm, pair, encoded, prompts, completions)
    if job.as_json:
        report = {
            "settings": _in_force(settings, llm),
            "completions": [_completion(c) for c in completions],
            "stats": stats.as_dict(),
            "timing": timing,
            "comparison": comparison,
            "versions": runtime.versions(),
        }
        print(json.dumps(report, indent=2), file=out)
        return
    print(_table(settings, stats, timing), file=out)
    if comparison:
        print(_comparison_lines(comparison, settings), file=out)


def _without_idle_slots(job: Job) -> Experiment:
    """A slot costs its rows in every pass, whether or not it holds a text."""
    engine = job.settings.engine
    slots = min(engine.max_batch, max(1, len(job.prompts)))
    engine = dataclasses.replace(engine, max_batch=slots)
    return dataclasses.replace(job.settings, engine=engine)


def _stream(llm, prompt: Prompt, params, out, options):
    """Runs one prompt; shows its text if `out`. Returns it and when it began."""
    chat = not isinstance(prompt, str)
    if chat:
        pieces = llm.stream_chat(prompt, params, options)
    else:
        pieces = llm.stream(prompt, params)
    if out and not chat:
        print(prompt, end="", file=out, flush=True)
    first = None
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            if out:
                print(piece, end="", file=out, flush=True)
    finally:
        # An interrupted text ends its line too.
        if out:
            print("\n", file=out, flush=True)
    return pieces.completion, first or time.perf_counter()


def _print_texts(completions, out) -> None:
    for completion in completions:
        prompt = completion.prompt
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"> {prompt}\n{completion.text.strip()}\n", file=out)


def _compare(job, settings, llm, pair, encoded, prompts, completions) -> dict[str, Any]:
    """Decodes plainly, and again with the tree, both compiled before."""
    params = settings.sampling
    plain = models.make_llm(settings, pair, "none")
    models.warm_up(plain, encoded)
    speeds = {"tree": 0.0, "plain": 0.0}
    for _ in range(_ROUNDS):
        for name, model in (("plain", plain), ("tree", llm)):
            generation, seconds = models.decode(model, prompts, params, job.options)
            speeds[name] = max(speeds[name], generation.stats.tokens / seconds)
            if name == "plain":
                reference = generation
    difference = None
    for index, (ours, theirs) in enumerate(zip(completions, reference, strict=True)):
        if ours.token_ids != theirs.token_ids:
            difference = _first_difference(index, ours.token_ids, theirs.token_ids)
            break
    return {
        "identical": difference is None,
        "first_difference": difference,
        "tokens_per_second": speeds["tree"],
        "plain_tokens_per_second": speeds["plain"],
        "speedup": speeds["tree"] / speeds["plain"] if speeds["plain"] else None,
    }


def _first_difference(index: int, ours: list[int], theirs: list[int]):
    shared = min(len(ours), len(theirs))
    at = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
    return {
        "prompt": index,
        "at": at,
        "tree": ours[at] if at < len(ours) else None,
        "plain": theirs[at] if at < len(theirs) else None,
    }


def _in_force(settings: Experiment, llm) -> dict[str, Any]:
    """The settings, with what was left to the model filled in."""
    values = settings.as_dict()
    del values["benchmark"]
    values["dtype"] = llm.dtype
    values["tau"] = getattr(llm.drafter, "tau", None)
    values["engine"] = dataclasses.asdict(llm.engine.config)
    return values


def _completion(completion) -> dict[str, Any]:
    values = {
        "prompt": completion.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stats": completion.stats.as_dict(),
    }
    if completion.logprobs is not None:
        values["logprobs"] = completion.logprobs
    return values


def _table(settings: Experiment, stats, timing: dict[str, float]) -> str:
    rows = [
        ("tree", settings.tree),
        ("rule", stats.label),
        ("tokens", str(stats.tokens)),
        ("steps", str(stats.steps)),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        ("acceptance by depth", table.percents(stats.acceptance_by_depth)),
        ("accepted by rank", table.percents(stats.acceptance_by_rank)),
        ("prefill", f"{stats.prefill_seconds:.3f} s"),
        ("decode", f"{stats.decode_seconds:.3f} s"),
        ("speed", f"{stats.tokens_per_second:.1f} tok/s"),
        ("load", f"{timing['load_seconds']:.2f} s"),
        ("compile", f"{timing['compile_seconds']:.2f} s"),
    ]
    if "first_token_seconds" in timing:
        seconds = timing["first_token_seconds"]
        rows.append(("time to first token", f"{seconds:.2f} s from start"))
    return table.aligned(rows)


def _comparison_lines(comparison: dict[str, Any], settings: Experiment) -> str:
    label = compatibility.label(settings.rule, settings.cascade)
    if comparison["identical"]:
        verdict = "identical to plain decoding"
    elif settings.cascade or (
        settings.rule != "exact" and settings.sampling.temperature > 0
    ):
        distribution = (
            "of the same distribution"
            if label == "lossless"
            else "of another distribution (LOSSY)"
        )
        verdict = f"others than those of plain decoding, and {distribution}"
    else:
        d = comparison["first_difference"]
        verdict = (
            f"DIFFERENT from plain decoding: prompt {d['prompt']}, token {d['at']} is "
            f"{d['tree']} with the tree and {d['plain']} without"
        )
    rows = [
        ("with the tree", f"{comparison['tokens_per_second']:.1f} tok/s"),
        ("plain", f"{comparison['plain_tokens_per_second']:.1f} tok/s"),
    ]
    if comparison["speedup"]:
        rows.append(("ratio", f"{comparison['speedup']:.2f}"))
    return f"\ntokens are {verdict}\n" + table.aligned(rows)
