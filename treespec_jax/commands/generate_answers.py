"""Generates a target's own texts, as token ids, to train drafters on.

Of questions, of passages of a text, or of a chat model's conversations with itself:

  generate_answers --target=MODEL --dialogues=20000 --max_tokens=512 --output=runs/texts

Stopped in any way, the same command goes on where it was. Decoding is plain from
--max_batch=8 on, unless a way to speculate is chosen. --verify_lossless then decodes
the texts of this run plainly as well, and compares; the folder stays as it is.
"""

from __future__ import annotations

import array
import dataclasses
from pathlib import Path

from absl.flags import (
    DEFINE_float,
    DEFINE_integer,
    DEFINE_list,
    DEFINE_multi_string,
    DEFINE_string,
)

from treespec_jax.checkpoints import drafters
from treespec_jax.commands import flags, loading, runtime, setting_flags, verifying
from treespec_jax.commands.settings import Experiment, fields_of
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import say

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
# Texts per slot that are compared at once: few slots are idle at the end.
_GROUP = 32


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
    flags.define("output", "verify_lossless", "compilation_cache")


def main(given) -> int | None:
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
        say(f"note: {count} prompts are too long for max_len={max_len}: left out")
    if not fitting:
        raise UserError(f"no prompt has room in max_len={max_len}; raise it")
    if experiment.engine.max_len is None:
        experiment = _with_room(experiment, fitting, max_len)

    if given.verify_lossless:
        _check_verified(experiment, fitting, settings)

    runtime.set_up(given.compilation_cache)
    pair = loading.load_pair(experiment)
    llm = loading.make_llms({"": experiment}, pair)[""]
    name, check = Path(experiment.target).name, None
    if given.verify_lossless:
        check = _Check(pair, experiment, verifying.probe(llm, pair.target.model))
        say(str(check.probed))
    keep = check and check.keep
    result = answering.generate(llm, name, fitting, settings, keep)
    _report(result, given.output)
    if check is None:
        return None
    if result.interrupted:
        say("interrupted: the texts of this run are not compared with plain decoding")
        return None
    # Its cache makes room for that of plain decoding.
    llm.close()
    del llm
    return check.carry_out(settings, fitting)


def _check_verified(experiment: Experiment, prompts, settings) -> None:
    """Refuses a comparison with plain decoding that would say nothing."""
    if experiment.plain:
        raise UserError(
            "--verify_lossless compares trees with plain decoding, and here decoding "
            f"is plain (--max_batch={experiment.engine.max_batch}); give "
            "--tree=dynamic:7@4 for example, or leave it out"
        )
    params = [settings.params(index, one) for index, one in enumerate(prompts)]
    verifying.check_same_text(experiment, params)


class _Check:
    """Texts that a run wrote, decoded plainly once more.

    Args:
      pair: the loaded models.
      experiment: with the trees.
      probed: see `verifying.probe`.
    """

    def __init__(self, pair: loading.Pair, experiment: Experiment, probed):
        self.probed = probed
        self._pair = pair
        self._settings = experiment.with_tree("none")
        # Of each written text its number, and the tokens behind the prompt.
        self._written: dict[int, array.array] = {}

    def keep(self, text) -> None:
        """Remembers an `answers.Text`."""
        self._written[text.index] = array.array("i", text.tokens[text.prompt_tokens :])

    def carry_out(self, settings, prompts) -> int:
        """Decodes plainly, says on stderr what differs; the exit code.

        Args:
          settings: `answering.Settings` of the texts.
          prompts: of all texts, by their numbers.
        """
        if not self._written:
            say("this run wrote no text: there is nothing to compare")
            return 0
        import tqdm

        from treespec_jax.measurement import exactness

        llm, pairs = self._pair.make(self._settings), []
        numbers = sorted(self._written)
        group = _GROUP * llm.engine.config.max_batch
        with tqdm.tqdm(
            total=len(numbers), unit="text", desc="plain", mininterval=2
        ) as bar:
            for start in range(0, len(numbers), group):
                some = numbers[start : start + group]
                params = [settings.params(i, prompts[i]) for i in some]
                ids = [list(prompts[i].ids) for i in some]
                plain = llm.generate(ids, params, on_finish=lambda *_: bar.update())
                pairs += [
                    exactness.TextPair(
                        index,
                        ids[number],
                        self._written[index],
                        array.array("i", plain[number].token_ids),
                        params[number],
                    )
                    for number, index in enumerate(some)
                ]
        return verifying.report(exactness.verdict(llm, pairs, self.probed))


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
