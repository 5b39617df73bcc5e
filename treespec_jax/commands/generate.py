"""Continues prompts with a target model and a drafter; see also README.md.

For example:

  generate --prompt="once upon a time" --tree=dynamic:15@5 --compare

--chat answers prompts by the checkpoint's chat template; without any prompt it holds a
conversation on stdin.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_multi_string, DEFINE_string

from treespec_jax import commands
from treespec_jax.checkpoints import recycle_table
from treespec_jax.commands import (
    dialogue,
    flags,
    loading,
    pictures,
    prompts,
    runtime,
)
from treespec_jax.commands.pictures import Pictures
from treespec_jax.commands.prompts import Prompt
from treespec_jax.commands.setting_flags import SettingFlags
from treespec_jax.commands.settings import Experiment
from treespec_jax.engine.stats import total
from treespec_jax.measurement import tables

_SECONDS = ("prefill_seconds", "decode_seconds", "compile_seconds")
# Timed runs of each way of decoding in a comparison; the better one counts.
_ROUNDS = 2
_SETTINGS = SettingFlags()


def define() -> None:
    _SETTINGS.define()
    DEFINE_string("prompt", None, "the text to continue")
    DEFINE_bool("chat", False, "answer prompts; without any, talk on stdin")
    DEFINE_string("system", None, "system message, with --chat")
    DEFINE_multi_string(
        "chat_option", None, "NAME=JSON for the chat template to see; repeatable"
    )
    DEFINE_bool("compare", False, "decode plainly too and compare")
    DEFINE_bool("json", False, "print one JSON object instead of text")
    pictures.define()
    flags.define("prompts_file", "compilation_cache")


def main(given) -> None:
    texts, opening = prompts.gather(
        given.chat, given.prompt, given.prompts_file, given.system
    )
    settings = _SETTINGS.experiment().with_paths()
    # A slot costs its rows in every pass, whether or not it holds a text.
    slots = min(settings.engine.max_batch, max(1, len(texts)))
    engine = dataclasses.replace(settings.engine, max_batch=slots)
    settings = dataclasses.replace(settings, engine=engine)
    options = prompts.options(given.chat_option)
    shown = pictures.asked(given)
    job = Job(settings, texts, opening, options, not given.json, shown)
    # Before jax starts and weights are read, so that a mistake is answered at once.
    trees = [] if settings.plain else [settings.speculative.tree]
    # A greeting stands for what the user will say, to see that it can be answered.
    some = texts or [[*opening, {"role": "user", "content": "Hello"}]]
    encoded = loading.check(settings, some, trees, options)
    table = settings.speculative.recycle_table
    if table and not settings.plain:
        recycle_table.check_output(table)
    runtime.set_up(given.compilation_cache)
    run(job, encoded, given.compare)


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
      settings: with their paths looked up.
      prompts: texts to continue, or conversations to answer.
      opening: messages in front of a conversation to hold on stdin, if there are no
        prompts.
      options: further values for the chat template to see.
      shown: print texts and tables rather than one JSON object.
      pictures: of the trees.
    """

    settings: Experiment
    prompts: Sequence[Prompt]
    opening: list[dict[str, Any]] | None
    options: dict[str, Any]
    shown: bool
    pictures: Pictures = Pictures()


def run(job: Job, encoded: list[list[int]], compare: bool) -> None:
    """Loads, compiles, generates and prints.

    Raises:
      UserError: a checkpoint that cannot be read, or a pair that does not fit together.
    """
    settings, params = job.settings, job.settings.sampling
    from treespec_jax.measurement import machine, rounds, step_cost

    began = time.perf_counter()
    pair = loading.load_pair(settings)
    recorded = job.pictures.recorded(settings)
    llm = loading.make_llms({"": recorded}, pair)[""]
    loaded = time.perf_counter()
    if not job.prompts:
        encoded = [[0] * (n + 1) for n in llm.engine.config.prefill_chunks]
    timing, compared = {"load_seconds": loaded - began}, None
    with loading.keeping_table(llm):
        step_cost.warm_up(llm, encoded, every_shape=compare)
        timing["compile_seconds"] = time.perf_counter() - loaded
        answered, completions, stats, first = _completions(job, llm, params)
        if first is not None:
            timing["first_token_seconds"] = first - commands.STARTED
        if compare and answered:
            llms = {"plain": loading.make_llm(settings.with_tree("none"), pair)}
            # An engine that records takes longer.
            same = recorded == settings
            llms["tree"] = llm if same else loading.make_llm(settings, pair)
            for other in llms.values():
                step_cost.warm_up(other, encoded)
            compared = _compare(job, llms, answered)
    comparison = compared and _verdict(completions, compared)
    in_force = loading.in_force(recorded, llm)
    if job.pictures.file:
        more = {}
        if compared:
            text = encoded[0], completions[0].token_ids
            more["parts"] = _parts(compared, pair.target.model, text, params)
            more["replays"] = pictures.replays(llm.tokenizer, compared.generations)
        shown = pictures.shown_settings(in_force)
        job.pictures.write(completions, shown, **more)
    records = [r for c in completions for r in c.records if settings.engine.record]
    reliability = rounds.reliability(records)
    if not job.shown:
        report = {
            "settings": in_force,
            "completions": [_completion(c) for c in completions],
            "stats": stats.as_dict(),
            "reliability": reliability,
            "timing": timing,
            "comparison": comparison,
            "versions": machine.versions(),
        }
        print(json.dumps(report, indent=2, default=dataclasses.asdict))
        return
    print(_table(settings, stats, timing))
    for line in tables.reliability({settings.speculative.tree: reliability}):
        print(line)
    if job.pictures.file:
        print(f"trace: {job.pictures.file}")
    if comparison:
        print(_comparison_lines(comparison, settings))


def _completions(job: Job, llm, params):
    """Prompts, completions, statistics, and when a lone text's first token came."""
    from treespec_jax.measurement import rounds

    if not job.prompts:
        answered, completions = dialogue.hold(
            lambda said, talks: _stream(job, llm, said, params, talks)[0], job.opening
        )
        parts = [c.stats for c in completions]
        seconds = [sum(getattr(s, name) for s in parts) for name in _SECONDS]
        return answered, completions, total(parts, *seconds), None
    if len(job.prompts) == 1:
        completion, first = _stream(job, llm, job.prompts[0], params)
        return job.prompts, [completion], completion.stats, first
    generation, seconds = rounds.decode(llm, job.prompts, params, job.options)
    for completion in generation if job.shown else ():
        prompt = completion.prompt
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"> {prompt}\n{completion.text.strip()}\n")
        if job.pictures.trees:
            job.pictures.printer(llm)(completion.trace.steps)
    stats = dataclasses.replace(generation.stats, decode_seconds=seconds)
    return job.prompts, list(generation), stats, None


def _stream(job: Job, llm, prompt: Prompt, params, talks: bool = False):
    """Runs one prompt; shows its text if asked to.

    Args:
      job: how.
      llm: an `LLM`.
      prompt: to run.
      params: how to sample.
      talks: an interrupt ends the text, not the program.

    Returns:
      The completion (None: interrupted before its text began), and when that began.
    """
    shown, trees = job.shown, job.pictures.trees
    if isinstance(prompt, str):
        pieces = llm.stream(prompt, params)
        if shown and not trees:
            print(prompt, end="", flush=True)
    else:
        pieces = llm.stream_chat(prompt, params, job.options)
    first, show = None, job.pictures.printer(llm)
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            if trees:
                show(pieces.take_steps())
            elif shown:
                print(piece, end="", flush=True)
        if trees:
            # The last step may have added no text.
            show(pieces.take_steps())
            start = prompt if isinstance(prompt, str) else ""
            print(start + pieces.completion.text, end="")
    except KeyboardInterrupt:
        if not talks:
            raise
        pieces.close()
        if not pieces.completion.text:
            return None, None
    finally:
        # An interrupted text ends its line too.
        if shown:
            print("\n", flush=True)
    return pieces.completion, first or time.perf_counter()


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


def _compare(job: Job, llms: dict[str, Any], prompts) -> Compared:
    """Decodes by `LLM`s that are compiled."""
    from treespec_jax.measurement import rounds

    params = job.settings.sampling
    found = Compared(llms, dict.fromkeys(llms, 0.0), {})
    for _ in range(_ROUNDS):
        for name, model in llms.items():
            generation, seconds = rounds.decode(model, prompts, params, job.options)
            speed = generation.stats.tokens / seconds
            if speed >= found.speeds[name]:
                found.speeds[name] = speed
                found.generations[name] = generation
    return found


def _verdict(completions, compared: Compared) -> dict[str, Any]:
    """What a comparison found, for JSON."""
    speeds, differences = compared.speeds, []
    pairs = zip(completions, compared.generations["plain"], strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        tokens = itertools.zip_longest(ours.token_ids, theirs.token_ids)
        for position, (token, other) in enumerate(tokens):
            if token != other:
                found = {"prompt": index, "at": position, "tree": token, "plain": other}
                differences.append(found)
    difference = differences[0] if differences else None
    return {
        "identical": difference is None,
        "first_difference": difference,
        "tokens_per_second": speeds["tree"],
        "plain_tokens_per_second": speeds["plain"],
        "speedup": speeds["tree"] / speeds["plain"] if speeds["plain"] else None,
    }


def _parts(compared: Compared, target, text, params) -> dict[str, float] | None:
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
    cost = step_cost.step_cost(engine, target, prefix, params, _ROUNDS)
    rest = max(0.0, cost.step - cost.draft - cost.target)
    return {"draft": cost.draft, "target": cost.target, "rest": rest}


def _completion(completion) -> dict[str, Any]:
    names = ["prompt", "text", "token_ids", "finish_reason", "seed"]
    values = {name: getattr(completion, name) for name in names}
    values["stats"] = completion.stats.as_dict()
    for name in ("", "top_", "prompt_", "prompt_top_"):
        found = getattr(completion, f"{name}logprobs")
        if found is not None:
            values[f"{name}logprobs"] = found
    return values


def _table(settings: Experiment, stats, timing: dict[str, float]) -> str:
    # Before the first text, and what turned out to be wanted later.
    compiling = timing["compile_seconds"] + stats.compile_seconds
    rows = [
        ("tree", "none" if settings.plain else settings.speculative.tree),
        ("rule", stats.label),
        ("tokens", str(stats.tokens)),
        ("steps", str(stats.steps)),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        ("acceptance by depth", tables.percents(stats.acceptance_by_depth)),
        ("accepted by rank", tables.percents(stats.acceptance_by_rank)),
        ("accepted by source", tables.shares(stats.accepted_by_source)),
        ("prefill", f"{stats.prefill_seconds:.3f} s"),
        ("decode", f"{stats.decode_seconds:.3f} s"),
        ("speed", f"{stats.tokens_per_second:.1f} tok/s"),
        ("load", f"{timing['load_seconds']:.2f} s"),
        ("compile", f"{compiling:.2f} s"),
    ]
    if "first_token_seconds" in timing:
        seconds = timing["first_token_seconds"]
        rows.append(("time to first token", f"{seconds:.2f} s from start"))
    return tables.aligned(rows)


def _comparison_lines(comparison: dict[str, Any], settings: Experiment) -> str:
    verdict = tables.verdict(settings.as_dict())
    if comparison["identical"]:
        verdict = "tokens are identical to plain decoding"
    elif verdict is None:
        d = comparison["first_difference"]
        verdict = (
            f"tokens are DIFFERENT from plain decoding: prompt {d['prompt']}, token "
            f"{d['at']} is {d['tree']} with the tree and {d['plain']} without"
        )
    rows = [
        ("with the tree", f"{comparison['tokens_per_second']:.1f} tok/s"),
        ("plain", f"{comparison['plain_tokens_per_second']:.1f} tok/s"),
    ]
    if comparison["speedup"]:
        rows.append(("ratio", f"{comparison['speedup']:.2f}"))
    return f"\n{verdict}\n" + tables.aligned(rows)
