"""How a suite is run: the order of cells, turns of a question, streams, seeds."""

from __future__ import annotations

import dataclasses

import pytest

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import Stats
from treespec_jax.errors import UserError
from treespec_jax.measurement import suite_run
from treespec_jax.measurement.decoders import Answer
from treespec_jax.measurement.grid import Combination, Task, schedule
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.suite import Question, Suite

PLAIN = Combination("none", "none", "exact", 0.0, 2)
CHAIN = Combination("ngram", "chain:2", "exact", 0.0, 2)
QUESTIONS = (
    Question("1", "a", ("one",)),
    Question("2", "b", ("two", "three")),
    Question("3", "b", ("four",)),
)
SUITE = Suite("s", QUESTIONS)
SAMPLING = SamplingParams(max_tokens=4, seed=7)


class Echo:
    """Answers with the tokens of the prompt, so many that they are counted.

    Attributes:
      calls: prompts, settings and whether a stream was asked for, of every call.
    """

    memory_bytes = 3

    def __init__(self, streams=False):
        self.streams = streams
        self.calls = []

    def answer(self, turns, params, streaming=False):
        self.calls.append(([turn.prompt for turn in turns], list(params), streaming))
        return [self._one(turn, each) for turn, each in zip(turns, params, strict=True)]

    def _one(self, turn, params):
        tokens = turn.ids[: params.max_tokens]
        arrivals = [(0.5 * (i + 1), 1) for i in range(len(tokens))]
        stats = Stats(tokens=len(tokens), steps=len(tokens), prefill_seconds=0.25)
        return Answer("x" * len(tokens), tokens, arrivals, stats)


def workload(**changes) -> suite_run.Workload:
    values = dict(
        suite=SUITE,
        sampling=SAMPLING,
        latency_tokens=2,
        chat=False,
        encode=lambda text: list(map(ord, text)),
        max_len=64,
    )
    return suite_run.Workload(**{**values, **changes})


def test_another_combination_comes_first_each_time():
    other = dataclasses.replace(CHAIN, temperature=1.0)
    tasks = list(schedule([PLAIN, CHAIN, other], QUESTIONS, 2))
    order = [
        (t.round, t.combination.label, t.combination.temperature, len(t.questions))
        for t in tasks
    ]
    none, chain = "none", "ngram chain:2"
    assert order == [
        *((0, none, 0, 2), (0, chain, 0, 2), (0, chain, 0, 1), (0, none, 0, 1)),
        *((0, chain, 1, 2), (0, chain, 1, 1)),
        *((1, chain, 0, 2), (1, none, 0, 2), (1, none, 0, 1), (1, chain, 0, 1)),
        *((1, chain, 1, 2), (1, chain, 1, 1)),
    ]
    keys = {str(task.cell(q)) for task in tasks for q in task.questions}
    assert len(keys) == 3 * 2 * 3


def test_questions_are_asked_turn_by_turn_with_the_answers_between():
    decoder = Echo()
    lines = suite_run.answer(decoder, Task(PLAIN, 0, QUESTIONS[:2]), workload())
    prompts = [call[0] for call in decoder.calls]
    second = "twoxxx\n\nthree"
    assert prompts == [["one", "two"], [second], ["one", "two"], [second]]
    assert [call[2] for call in decoder.calls] == [False, False, True, True]
    assert [p.max_tokens for p in decoder.calls[2][1]] == [2, 2]
    one, two = lines
    assert (one["turns"], two["turns"]) == (1, 2)
    assert (one["tokens"], two["tokens"]) == (3, 3 + 4)
    assert two["token_ids"] == [list(map(ord, "two")), list(map(ord, "twox"))]
    assert two["texts"] == ["xxx", "xxxx"]
    assert two["prompt_tokens"] == 3 + len(second)
    # 3 tokens, then 4 of the second alone; the wall is shared by the questions.
    assert (one["seconds"], two["seconds"]) == (1.5, 3.5)
    assert one["wall_seconds"] == two["wall_seconds"] == 3.5 / 2
    assert (one["prefill_seconds"], two["prefill_seconds"]) == (0.25, 0.5)
    assert one["arrivals"] == [[(0.5, 1), (1.0, 1)]]
    assert len(two["arrivals"]) == 2 and one["memory_bytes"] == 3
    assert two["category"] == "b" and one["peak_rss_bytes"] > 1 << 20


def test_streams_are_taken_in_the_first_round_alone():
    decoder = Echo()
    (line,) = suite_run.answer(decoder, Task(PLAIN, 1, QUESTIONS[:1]), workload())
    assert line["arrivals"] is None and len(decoder.calls) == 1
    (line,) = suite_run.answer(
        decoder, Task(PLAIN, 0, QUESTIONS[:1]), workload(latency_tokens=0)
    )
    assert line["arrivals"] is None and len(decoder.calls) == 2
    other = Echo(streams=True)
    (line,) = suite_run.answer(other, Task(PLAIN, 1, QUESTIONS[:1]), workload())
    assert len(other.calls) == 1 and len(line["arrivals"][0]) == 3


def test_seeds_are_those_of_the_question_and_the_round():
    load = workload()

    def seeds(combination, number, questions):
        return [p.seed for p in load.params(Task(combination, number, questions))]

    hot = dataclasses.replace(CHAIN, temperature=1.0, batch=1)
    assert seeds(PLAIN, 0, QUESTIONS[1:]) == [8, 9]
    assert seeds(hot, 1, QUESTIONS[1:2]) == [7 + 3 + 1]
    assert load.params(Task(hot, 0, QUESTIONS))[0].temperature == 1.0


def test_turns_without_room_are_left_out():
    (line,) = suite_run.answer(
        Echo(), Task(PLAIN, 0, QUESTIONS[1:2]), workload(max_len=13)
    )
    assert line["turns"] == 1 and line["texts"] == ["xxx"]


def test_an_answer_without_a_token_is_an_error():
    empty = workload(encode=lambda text: [])
    with pytest.raises(UserError, match="question 1 got no token"):
        suite_run.answer(Echo(), Task(PLAIN, 0, QUESTIONS[:1]), empty)


def test_chat_models_get_messages():
    decoder = Echo()
    load = workload(chat=True, encode=lambda messages: [1] * len(messages))
    suite_run.answer(decoder, Task(PLAIN, 1, QUESTIONS[1:2]), load)
    (first,), (second,) = (call[0] for call in decoder.calls)
    assert first == [{"role": "user", "content": "two"}]
    assert [m["content"] for m in second] == ["two", "x", "three"]


def test_only_what_is_missing_runs(tmp_path):
    tasks = list(schedule([PLAIN, CHAIN], QUESTIONS, 2))
    decoders = {PLAIN.program: Echo(), CHAIN.program: Echo()}

    def run(journal, stop_after=99):
        seen = []

        def progress(task):
            seen.append(task)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        suite_run.run(tasks, decoders, workload(), journal, progress)
        return seen

    journal = Journal(tmp_path, {})
    journal.begin({}, {})
    with pytest.raises(KeyboardInterrupt):
        run(journal, stop_after=3)
    done = journal.all("answer")
    assert len(done) == 5
    for decoder in decoders.values():
        decoder.calls.clear()
    again = Journal(tmp_path, {})
    again.begin({}, {})
    assert run(again) == tasks
    assert again.all("answer")[:5] == done and len(again.all("answer")) == 2 * 2 * 3
    assert all(suite_run.is_done(task, again) for task in tasks)
    for decoder in decoders.values():
        decoder.calls.clear()
    run(again)
    assert not any(decoder.calls for decoder in decoders.values())
