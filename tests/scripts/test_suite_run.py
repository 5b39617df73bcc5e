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
    """Answers with the tokens of the prompt.

    Attributes:
      calls: prompts, settings and whether a stream was asked for, of every call;
        "reset" between them.
    """

    memory_bytes = 3

    def __init__(self):
        self.calls = []

    def reset(self):
        self.calls.append("reset")

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


def test_streams_are_timed_behind_the_first_round():
    peer = Combination("transformers", "plain", "-", 0.0, 2)
    tasks = list(schedule([PLAIN, CHAIN, peer], QUESTIONS, 2, streams=True))
    order = [(t.round, t.stream, t.combination.label, len(t.questions)) for t in tasks]
    none, chain = "none", "ngram chain:2"
    assert [t.stream for t in tasks] == [False] * 6 + [True] * 4 + [False] * 6
    streams = [(0, True, none, 2), (0, True, chain, 2), (0, True, chain, 1)]
    assert order[6:10] == [*streams, (0, True, none, 1)]
    assert [task.kind for task in tasks[5:7]] == ["answer", "stream"]


def test_questions_are_asked_turn_by_turn_with_the_answers_between():
    decoder = Echo()
    lines = suite_run.answer(decoder, Task(PLAIN, 0, QUESTIONS[:2]), workload(), None)
    second = "twoxxx\n\nthree"
    assert [call[0] for call in decoder.calls] == [["one", "two"], [second]]
    assert not any(call[2] for call in decoder.calls)
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
    assert one["arrivals"] is None and one["memory_bytes"] == 3
    assert two["category"] == "b" and one["peak_rss_bytes"] > 1 << 20


def test_streams_are_those_of_the_same_turns(tmp_path):
    decoder, task = Echo(), Task(PLAIN, 0, QUESTIONS[:2])
    journal = Journal(tmp_path, {})
    journal.begin({}, {})
    journal.add("answer", [(task.cell(QUESTIONS[0]), {"texts": ["a"]})])
    journal.add("answer", [(task.cell(QUESTIONS[1]), {"texts": ["b", "c"]})])
    timed = dataclasses.replace(task, stream=True)
    one, two = suite_run.stream(decoder, timed, workload(), journal)
    assert [call[0] for call in decoder.calls] == [["one", "two"], ["twob\n\nthree"]]
    assert all(call[2] for call in decoder.calls)
    assert [p.max_tokens for p in decoder.calls[0][1]] == [2, 2]
    assert one == {"category": "a", "arrivals": [[(0.5, 1), (1.0, 1)]]}
    assert len(two["arrivals"]) == 2


def test_a_peer_tells_its_arrivals_with_its_answer():
    peer = Combination("transformers", "plain", "-", 0.0, 1)
    (line,) = suite_run.answer(Echo(), Task(peer, 1, QUESTIONS[:1]), workload(), None)
    assert len(line["arrivals"][0]) == 3


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
        Echo(), Task(PLAIN, 0, QUESTIONS[1:2]), workload(max_len=13), None
    )
    assert line["turns"] == 1 and line["texts"] == ["xxx"]


def test_an_answer_without_a_token_is_an_error():
    empty = workload(encode=lambda text: [])
    with pytest.raises(UserError, match="question 1 got no token"):
        suite_run.answer(Echo(), Task(PLAIN, 0, QUESTIONS[:1]), empty, None)


def test_chat_models_get_messages():
    decoder = Echo()
    load = workload(chat=True, encode=lambda messages: [1] * len(messages))
    suite_run.answer(decoder, Task(PLAIN, 1, QUESTIONS[1:2]), load, None)
    (first,), (second,) = (call[0] for call in decoder.calls)
    assert first == [{"role": "user", "content": "two"}]
    assert [m["content"] for m in second] == ["two", "x", "three"]


def test_every_pass_begins_without_what_was_learnt(tmp_path):
    hot = dataclasses.replace(CHAIN, temperature=1.0)
    tasks = list(schedule([PLAIN, CHAIN, hot], QUESTIONS, 2, streams=True))
    decoders = {PLAIN: Echo(), CHAIN: Echo()}
    journal = Journal(tmp_path, {})
    journal.begin({}, {})
    suite_run.run(tasks, decoders, workload(), journal, lambda task: None)
    calls = decoders[CHAIN].calls
    assert calls[0] == "reset" and calls.count("reset") == 2 * 3
    begun = [calls[i + 1] for i, call in enumerate(calls) if call == "reset"]
    assert all(prompts[0] == "one" for prompts, _, _ in begun)
    heat = [params[0].temperature for _, params, _ in begun]
    assert heat == [0, 0, 1, 1, 0, 1]
    assert [streaming for _, _, streaming in begun] == [False, True] * 2 + [False] * 2


def test_only_what_is_missing_runs(tmp_path):
    tasks = list(schedule([PLAIN, CHAIN], QUESTIONS, 2))
    decoders = {PLAIN: Echo(), CHAIN: Echo()}

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
