"""Continues prompts with a target model and a drafter; see also README.md.

For example:

  generate --prompt="once upon a time" --tree=dynamic:15@5 --compare

--chat answers prompts by the checkpoint's chat template; without any prompt it holds a
conversation on stdin. --prompts_file answers many, each as soon as it is finished:

  generate --prompts_file=prompts.jsonl --output=answers.jsonl --resume

--n=4 --temperature=0.8 writes four texts of every prompt; with --best_of=8 the four
likeliest of eight.

--beams=4 searches for likely texts instead of sampling, and prints their scores.

Text goes to stdout; statistics, notes and progress go to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_multi_string, DEFINE_string

from treespec_jax import commands, distributed
from treespec_jax.checkpoints import recycle_table
from treespec_jax.commands import (
    answers,
    dialogue,
    flags,
    generate_beams,
    generate_report,
    loading,
    pictures,
    prompts,
    runtime,
    side_by_side,
    verifying,
)
from treespec_jax.commands.answers import AnswerFile, Question
from treespec_jax.commands.pictures import Pictures
from treespec_jax.commands.prompts import Prompt
from treespec_jax.commands.setting_flags import SettingFlags
from treespec_jax.commands.settings import Experiment
from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables

_SECONDS = ("prefill_seconds", "decode_seconds", "compile_seconds")
_SETTINGS = SettingFlags(samples=True)


def define() -> None:
    _SETTINGS.define()
    DEFINE_string("prompt", None, "the text to continue")
    DEFINE_bool("chat", False, "answer prompts; without any, talk on stdin")
    DEFINE_string("system", None, "system message, with --chat")
    DEFINE_multi_string(
        "chat_option", None, "NAME=JSON for the chat template to see; repeatable"
    )
    DEFINE_bool("compare", False, "decode plainly too and compare")
    DEFINE_bool("json", False, "print JSON: an object, or a line per answer to a file")
    DEFINE_bool("quiet", False, "no statistics and no progress on stderr")
    DEFINE_string("output", "", "file for the answers to --prompts_file, JSON lines")
    DEFINE_bool("resume", False, "go on with the answers in --output")
    DEFINE_bool("overwrite", False, "forget the answers in --output")
    pictures.define()
    generate_beams.define()
    flags.define("prompts_file", "verify_lossless", "compilation_cache", *flags.CLUSTER)


def main(given) -> int | None:
    beams = generate_beams.asked(given)
    lines, opening = prompts.gather(
        given.chat, given.prompt, given.prompts_file, given.system
    )
    settings = _SETTINGS.experiment().with_paths()
    verifying.check_alone(given, "verify_lossless", "trace")
    settings = runtime.join(given, settings)
    if distributed.is_follower():
        runtime.set_up(given.compilation_cache)
        return loading.follow()
    file = _answer_file(given)
    asked = answers.questions(lines, settings.target, settings.sampling)
    remaining = asked if file is None else file.unanswered(asked)
    # A slot costs its rows in every pass, whether or not it holds a text.
    needed = sum(q.sampling.samples for q in asked) * (beams["beams"] if beams else 1)
    slots = min(settings.engine.max_batch, max(1, needed))
    engine = dataclasses.replace(settings.engine, max_batch=slots)
    settings = dataclasses.replace(settings, engine=engine)
    job = Job(
        settings,
        remaining,
        opening,
        prompts.options(given.chat_option),
        pictures.asked(given),
        Output(given.json, given.quiet, given.prompts_file is not None, file),
        done=len(asked) - len(remaining),
    )
    # Before jax starts and weights are read, so that a mistake is answered at once.
    encoded = _check(job)
    _check_samples(job, given)
    if given.compare or given.verify_lossless:
        verifying.check_whole(job.params or [settings.sampling])
    if given.verify_lossless and not beams:
        verifying.check_same_text(settings, job.params)
    if asked and not remaining:
        job.output.say(f"{file.path} has all {len(asked)} answers")
        return
    runtime.set_up(given.compilation_cache)
    if beams:
        verify = given.verify_lossless
        return generate_beams.run(settings, job.prompts, beams, job.output, verify)
    return run(job, encoded, given.compare, given.verify_lossless)


def _answer_file(given) -> AnswerFile | None:
    """What --output, --resume and --overwrite ask for."""
    if not given.output:
        for name in ("resume", "overwrite"):
            if given[name].value:
                raise UserError(f"--{name} needs --output=FILE; name the file")
        return None
    if given.prompts_file is None:
        raise UserError("--output takes the answers to --prompts_file; give one")
    if given.resume and given.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    return AnswerFile(Path(given.output).expanduser(), given.resume, given.overwrite)


@dataclasses.dataclass(frozen=True)
class Output:
    """Where what is printed goes: text to stdout, all else to stderr.

    Attributes:
      json: print JSON instead of text.
      quiet: no statistics and no progress.
      many: prompts come from a file; a JSON line or a text for each.
      file: for the answers; None: stdout.
    """

    json: bool = False
    quiet: bool = False
    many: bool = False
    file: AnswerFile | None = None

    def say(self, line: str) -> None:
        """Tells a person something."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @property
    def shows_text(self) -> bool:
        """Whether texts go to stdout."""
        return not self.json and self.file is None


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate.

    Attributes:
      settings: with their paths looked up.
      questions: with texts to continue, or conversations to answer.
      opening: messages in front of a conversation to hold on stdin, if there are no
        questions.
      options: further values for the chat template to see.
      pictures: of the trees.
      output: where everything goes.
      done: questions that an earlier run answered.
    """

    settings: Experiment
    questions: Sequence[Question]
    opening: list[dict[str, Any]] | None
    options: dict[str, Any]
    pictures: Pictures = Pictures()
    output: Output = Output()
    done: int = 0

    @property
    def prompts(self) -> list[Prompt]:
        """Of all questions."""
        return [question.prompt for question in self.questions]

    @property
    def params(self) -> list[SamplingParams]:
        """Of all questions."""
        return [question.sampling for question in self.questions]


def _check(job: Job) -> list[list[int]]:
    """Token ids of the prompts, once all that weights are not needed for is right.

    Raises:
      UserError: what `loading.check` raises, of the settings of any question.
    """
    settings = job.settings
    trees = [] if settings.plain else [settings.speculative.tree]
    # A greeting stands for what the user will say, to see that it can be answered.
    greeting = [*(job.opening or ()), {"role": "user", "content": "Hello"}]
    some = job.prompts or ([] if job.done else [greeting])
    encoded = loading.check(settings, some, trees, job.options, job.params)
    table = settings.speculative.recycle_table
    if table and not settings.plain:
        recycle_table.check_output(table)
    return encoded


def _check_samples(job: Job, given) -> None:
    """Refuses several texts of a prompt where one is wanted."""
    params = max(job.params or [job.settings.sampling], key=lambda p: p.samples)
    if params.samples == 1:
        return
    if given.beams:
        raise UserError(
            f"--beams takes one text of a prompt, not n={params.n}, "
            f"best_of={params.best_of}; leave one of them out"
        )
    if job.opening is not None:
        raise UserError(
            f"n={params.n}, best_of={params.best_of}: a conversation has one answer at "
            "a time; leave them out, or give --prompt"
        )


def run(job: Job, encoded: list[list[int]], compare: bool, verify: bool) -> int:
    """Loads, compiles, generates and prints.

    Args:
      job: what to generate.
      encoded: token ids of the prompts.
      compare: decode plainly too.
      verify: the same, and explain what differs.

    Returns:
      the exit code: 1 if a text was to be that of plain decoding and is not.

    Raises:
      UserError: a checkpoint that cannot be read, or a pair that does not fit together.
    """
    settings, params = job.settings, job.params or [job.settings.sampling]
    from treespec_jax.measurement import exactness, step_cost

    compare |= verify
    began = time.perf_counter()
    pair = loading.load_pair(settings)
    recorded = job.pictures.recorded(settings)
    llm = loading.make_llms({"": recorded}, pair)[""]
    loaded = time.perf_counter()
    if not job.questions:
        encoded = [[0] * (n + 1) for n in llm.engine.config.prefill_chunks]
    timing, compared, verdict = {"load_seconds": loaded - began}, None, None
    if verify:
        probed = verifying.probe(llm, pair.target.model)
        job.output.say(str(probed))
        # Which is not part of compiling.
        loaded = time.perf_counter()
    with loading.keeping_table(llm):
        with runtime.says_compiling(not job.output.quiet):
            step_cost.warm_up(llm, encoded, every_shape=compare)
        timing["compile_seconds"] = time.perf_counter() - loaded
        answered, completions, stats, first = _completions(job, llm, params)
        if first is not None:
            timing["first_token_seconds"] = first - commands.STARTED
        if compare and answered:
            llms = {"plain": pair.make(settings.with_tree("none"))}
            # An engine that records takes longer.
            same = recorded == settings
            llms["tree"] = llm if same else pair.make(settings)
            with runtime.says_compiling(not job.output.quiet):
                for other in llms.values():
                    step_cost.warm_up(other, encoded)
            params = job.params or [settings.sampling] * len(answered)
            compared = side_by_side.compare(llms, answered, params, job.options)
            texts = exactness.pairs(completions, compared.generations["plain"], params)
        if compared and verify:
            verdict = exactness.verdict(llms["plain"], texts, probed)
    in_force = loading.in_force(recorded, llm)
    if job.pictures.file:
        more = {}
        if compared:
            more["parts"] = side_by_side.parts(
                compared,
                pair.target.model,
                (encoded[0], completions[0].token_ids),
                params[0],
            )
            # Of several texts of a prompt, plain decoding may put others first.
            if all(one.samples == 1 for one in params):
                more["replays"] = pictures.replays(llm.tokenizer, compared.generations)
        shown = pictures.shown_settings(in_force)
        drawn = [text for completion in completions for text in completion.texts]
        job.pictures.write(drawn, shown, **more)
    comparison = compared and generate_report.verdict(texts, compared.speeds)
    _report(job, in_force, completions, stats, (timing, comparison, verdict))
    if verdict is None:
        return 0
    return verifying.report(verdict, quiet=job.output.quiet or job.output.json)


def _report(job: Job, in_force, completions, stats, measured) -> None:
    """Prints what there is to say of texts that were shown already."""
    from treespec_jax.measurement import machine, rounds

    settings, output, (timing, comparison, verdict) = job.settings, job.output, measured
    texts = [text for completion in completions for text in completion.texts]
    records = [r for text in texts for r in text.records if settings.engine.record]
    reliability = rounds.reliability(records)
    if output.json:
        report = {
            "settings": in_force,
            "completions": [generate_report.completion(c) for c in completions],
            "stats": stats.as_dict(),
            "reliability": reliability,
            "timing": timing,
            "comparison": comparison,
            "exactness": verdict and verdict.as_dict(),
            "versions": machine.versions(),
        }
        if output.many:  # each was written when it was finished
            del report["completions"]
        print(
            json.dumps(
                report, indent=None if output.many else 2, default=dataclasses.asdict
            )
        )
        return
    output.say(generate_report.table(settings, stats, timing, comparison))
    for line in tables.reliability({settings.speculative.tree: reliability}):
        output.say(line)
    if job.pictures.file:
        output.say(f"trace: {job.pictures.file}")
    if comparison:
        output.say("\n" + generate_report.gain(comparison, stats, settings))


def _completions(job: Job, llm, params):
    """Prompts, completions, statistics, and when a lone text's first token came."""
    if not job.questions:
        answered, completions = dialogue.hold(
            lambda said, talks: _stream(job, llm, said, params[0], talks)[0],
            job.opening,
        )
        parts = [c.stats for c in completions]
        seconds = [sum(getattr(s, name) for s in parts) for name in _SECONDS]
        return answered, completions, total(parts, *seconds), None
    if not job.output.many and params[0].samples == 1:
        completion, first = _stream(job, llm, job.prompts[0], params[0])
        return job.prompts, [completion], completion.stats, first
    generation, seconds = _answer_all(job, llm)
    stats = dataclasses.replace(generation.stats, decode_seconds=seconds)
    return job.prompts, list(generation), stats, None


def _answer_all(job: Job, llm):
    """Answers all questions, writes each when it is finished; see `rounds.decode`."""
    from treespec_jax.measurement import rounds

    output, count = job.output, job.done
    whole = len(job.questions) + job.done
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.file.writing()) if output.file else sys.stdout
        shown = not output.quiet
        bar = stack.enter_context(answers.bar(whole, job.done, shown))

        def finished(index: int, completion) -> None:
            nonlocal count
            if output.shows_text:
                # A bar and a text may share a terminal.
                bar.clear()
                _show(job, llm, completion)
            elif output.many:
                record = job.questions[index].record()
                answers.write(file, record | generate_report.completion(completion))
            count += 1
            bar.update()

        try:
            return rounds.decode(
                llm, job.prompts, job.params, job.options, on_finish=finished
            )
        except KeyboardInterrupt:
            bar.close()
            if output.file:
                output.say(
                    f"{output.file.path} has {count} of {whole} answers; the same "
                    "command with --resume goes on"
                )
            raise


def _show(job: Job, llm, completion) -> None:
    """Prints a prompt and its answer."""
    prompt = completion.prompt
    prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    print(f"> {prompt}")
    several = len(completion.texts) > 1
    for number, text in enumerate(completion.texts, 1):
        mark = f"[{number}] " if several else ""
        print(f"{mark}{text.text.strip()}\n", flush=True)
        if job.pictures.trees:
            job.pictures.printer(llm)(text.trace.steps)


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
    shown, trees = job.output.shows_text, job.pictures.trees
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
