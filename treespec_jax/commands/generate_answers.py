"""Generates a target's own texts, as token ids, to train drafters on.

Of questions, of passages of a text, or of a chat model's conversations with itself:

  generate_answers --target=MODEL --dialogues=20000 --max_tokens=512 --output=runs/texts

Stopped in any way, the same command goes on where it was. Decoding is plain from
--max_batch=8 on, unless a way to speculate is chosen.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from absl.flags import (
    DEFINE_float,
    DEFINE_integer,
    DEFINE_list,
    DEFINE_multi_string,
    DEFINE_string,
)

from treespec_jax.checkpoints import drafters
from treespec_jax.commands import flags, loading, runtime, setting_flags
from treespec_jax.commands.settings import Experiment, fields_of
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.errors import UserError

# What texts may be asked for here.
_ASKED = ("max_tokens", "top_k", "top_p", "min_p", "seed", "ignore_eos")
_SETTINGS = setting_flags.SettingFlags(
    defaults={
        "sampling.max_tokens": 512,
        "engine.max_batch": 32,
        "engine.steps_per_dispatch": 32,
        # Powers of two: a pass for each prompt. Sizes that none needs are not compiled.
        "engine.prefill_chunks": (16, 32, 64, 128, 256, 512),
    },
    # By text, or of no use here.
    without=(
        *(s.dotted for s in fields_of("sampling") if s.name not in _ASKED),
        *("speculative.recycle_table", "engine.record"),
    ),
)
# Drafting takes longer than it saves where so many texts share a pass.
_PLAIN_FROM = 8


def define() -> None:
    _SETTINGS.define()
    DEFINE_multi_string(
        "prompts_file",
        [],
        "file of prompts, one a line; in .jsonl a prompt, a question, messages, or "
        "instruction and input; repeatable",
    )
    DEFINE_integer("limit", 0, "prompts of each file; 0: all", lower_bound=0)
    DEFINE_multi_string("passages", [], "text to cut into passages; repeatable")
    words = "prompt for passages, as in 'Summarize: {passage}'; repeatable: in turn"
    DEFINE_multi_string("template", [], words)
    DEFINE_integer("passage_chars", 1000, "of a passage, at most", lower_bound=1)
    words = "conversations in which a chat model writes both sides"
    DEFINE_integer("dialogues", 0, words, lower_bound=0)
    words = "texts of a model without a chat template, from their beginning"
    DEFINE_integer("stories", 0, words, lower_bound=0)
    DEFINE_string("openings", "", "file of an opening a line, for --stories in turn")
    words = "of the texts in turn; dialogues and stories are sampled at 1"
    DEFINE_list("temperatures", ["0", "1"], words)
    DEFINE_float("max_minutes", 0.0, "then no text is begun; 0: no limit")
    DEFINE_string("shard", "0/1", "I/N: this is process I of N that share the work")
    flags.define("output", "compilation_cache")


def main(given) -> None:
    from treespec_jax.training import answering
    from treespec_jax.training.answer_prompts import Sources, gather

    experiment = _SETTINGS.experiment()
    sources = Sources(
        prompts=tuple(given.prompts_file),
        limit=given.limit,
        passages=tuple(given.passages),
        templates=tuple(given.template),
        passage_chars=given.passage_chars,
        dialogues=given.dialogues,
        stories=given.stories,
        openings=given.openings,
    )
    asked = experiment.sampling
    settings = answering.Settings(
        output=given.output,
        sampling=SamplingParams(
            max_tokens=asked.max_tokens,
            top_k=asked.top_k,
            top_p=asked.top_p,
            min_p=asked.min_p,
            ignore_eos=asked.ignore_eos,
        ),
        temperatures=flags.numbers("temperatures", given.temperatures, float),
        seed=asked.seed,
        shard=_shard(given.shard),
        max_minutes=given.max_minutes,
    )
    experiment = _speculating(experiment).with_paths()
    trees = [] if experiment.plain else [experiment.speculative.tree]
    target, max_len = loading.check_models(experiment, trees)
    prompts = gather(sources, target.tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt.ids) < max_len]
    if len(fitting) < len(prompts):
        count = len(prompts) - len(fitting)
        print(
            f"note: {count} prompts are too long for max_len={max_len}: left out",
            file=sys.stderr,
        )
    if not fitting:
        raise UserError(f"no prompt has room in max_len={max_len}; raise it")
    if experiment.engine.max_len is None:
        experiment = _with_room(experiment, fitting, max_len)

    runtime.set_up(given.compilation_cache)
    pair = loading.load_pair(experiment)
    llm = loading.make_llms({"": experiment}, pair)[""]
    name = Path(experiment.target).name
    _report(answering.generate(llm, name, fitting, settings), given.output)


def _speculating(experiment: Experiment) -> Experiment:
    """Plain decoding where it is the quicker one and nothing else was chosen."""
    usual = drafters.choose(experiment.target, SpeculativeConfig())
    if experiment.speculative == usual and experiment.engine.max_batch >= _PLAIN_FROM:
        return experiment.with_tree("none")
    return experiment


def _with_room(experiment: Experiment, prompts, longest: int) -> Experiment:
    """With max_len for the longest prompt and its text: more would take memory."""
    size = experiment.engine.page_size
    rows = max(len(prompt.ids) for prompt in prompts) + experiment.sampling.max_tokens
    max_len = min(longest, -(-rows // size) * size)
    engine = dataclasses.replace(experiment.engine, max_len=max_len)
    return dataclasses.replace(experiment, engine=engine)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    try:
        return int(index), int(count) if slash else 0
    except ValueError:
        raise UserError(f"--shard={text}: give I/N, 0/2 for example") from None


def _report(result, output: str) -> None:
    print(
        f"{result.tokens:,} tokens in {result.texts:,} texts in {result.seconds:.1f} s "
        f"({result.tokens_per_second:,.0f} tok/s); {output} holds "
        f"{result.total_tokens:,} tokens in {result.total_texts:,} texts"
    )
    if not result.finished:
        print("some texts are missing; the same command goes on")
