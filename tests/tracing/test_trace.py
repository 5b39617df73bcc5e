"""Traces: what they say of a text, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import math
import struct

import numpy as np
import pytest

from tests.checkpoints.support import train_sentencepiece
from tests.engine.scripted import follow, scripted, write
from tests.tracing.synthetic import random_request, random_trace
from treespec_jax.checkpoints.tokenizers import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.exploration import explore
from treespec_jax.llm import LLM
from treespec_jax.tracing import build, curves, figure, files, trace
from treespec_jax.tracing.terminal import TreeText

SIZES = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)
PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("tracing")))


@pytest.fixture(scope="module")
def script(tokenizer):
    return write(tokenizer)


@pytest.fixture(scope="module")
def llm(tokenizer, script):
    """Its drafter is right but for three tokens."""
    successors = follow([script.prompt_ids[-1], *script.ids])
    target = scripted(tokenizer, successors)
    for position in (2, 7, 11):
        successors[script.ids[position]] = script.ids[0]
    draft = scripted(tokenizer, successors)
    settings = {"model": draft, "tree": "regular:2x1x1"}
    return LLM(target, speculative=settings, record=True, **SIZES)


@pytest.fixture(scope="module")
def completion(llm, script):
    (found,) = llm.generate(script.prompt, PARAMS)
    assert found.text == script.text
    return found


def test_a_trace_says_how_the_text_came_about(completion, script):
    """Each step's path, then the target's own token, spell the tokens of the text."""
    found, root, tokens = completion.trace, script.prompt_ids[-1], []
    for step in found.steps:
        assert step.tokens[0] == root and step.parents[0] == 0
        assert all(p < n for n, p in enumerate(step.parents) if n)
        above = 0
        for node in step.path:
            assert step.parents[node] == above
            above = node
        drafted = [step.tokens[node] for node in step.path]
        assert list(step.emitted[: len(drafted)]) == drafted[: len(step.emitted)]
        assert step.has_bonus == (len(step.emitted) > len(drafted))
        tokens += step.emitted
        root = tokens[-1]
    assert tokens == completion.token_ids
    assert any(step.path for step in found.steps)
    assert not all(step.path for step in found.steps)
    pieces = [piece for step in found.steps for piece in step.pieces]
    assert "".join(pieces) == completion.text
    assert found.prompt == (("", script.prompt),)
    assert set(tokens) <= set(found.vocabulary)
    assert found.finish_reason == completion.finish_reason
    assert found.stats == completion.stats.as_dict()


def test_steps_of_a_dispatch_share_their_time(completion):
    found = completion.trace
    assert list(found.arrivals) == sorted(found.arrivals)
    tokens = [0] * len(found.arrivals)
    for step in found.steps:
        tokens[step.dispatch] += len(step.emitted)
    assert tokens == [count for _, count in completion.arrivals]


def test_a_stop_text_cuts_the_pieces(llm, script, completion):
    stop = script.text[len(script.text) // 2 :][:2]
    params = dataclasses.replace(PARAMS, stop=(stop,))
    (cut,) = llm.generate(script.prompt, params)
    assert cut.text == script.text[: script.text.index(stop)]
    pieces = [piece for step in cut.trace.steps for piece in step.pieces]
    assert "".join(pieces) == cut.text
    emitted = [token for step in cut.trace.steps for token in step.emitted]
    assert emitted == cut.token_ids
    check_counts(cut.trace)


def test_steps_come_while_a_text_is_streamed(llm, script, completion):
    stream, steps = llm.stream(script.prompt, PARAMS), []
    for _ in stream:
        steps += stream.take_steps()
    steps += stream.take_steps()
    shapes = [(step.parents, step.tokens, step.emitted) for step in steps]
    wanted = completion.trace.steps
    assert shapes == [(s.parents, s.tokens, s.emitted) for s in wanted]
    # The first one alone, then as many a dispatch as the machine is quick.
    dispatches = [step.dispatch for step in steps]
    assert dispatches[:2] == [0, 1] and dispatches == sorted(dispatches)
    assert set(dispatches) == set(range(dispatches[-1] + 1))


def test_a_conversation_and_token_ids(llm, script, tokenizer):
    (found,) = llm.generate([script.prompt_ids], PARAMS)
    assert found.trace.prompt == (("", tokenizer.decode(script.prompt_ids)),)
    said = [{"role": "user", "content": "hello"}]
    request = Request(list(script.prompt_ids), PARAMS)
    assert build.trace_of(request, said, "").prompt == (("user", "hello"),)


def test_what_was_not_recorded_has_no_trace(completion):
    bare = dataclasses.replace(completion, make_trace=None)
    with pytest.raises(UserError, match="record=True"):
        _ = bare.trace


def test_explore(llm, script, tmp_path):
    found = explore(script.prompt, llm, max_tokens=13)
    assert found.stats.tokens == 13
    # The last character is not complete.
    assert found.text[-1] == "\ufffd" and script.text.startswith(found.text[:-1])
    assert found.trace.text == found.text
    assert len(found.trace.arrivals) == found.stats.steps
    (again,) = trace.read(found.save(tmp_path / "t.json"))
    assert again == found.trace
    with pytest.raises(UserError, match="leave out draft, tree"):
        explore(script.prompt, llm, draft="x", tree="chain:2")
    with pytest.raises(UserError, match="temprature"):
        explore(script.prompt, llm, temprature=1)


def test_explore_shows_a_page(llm, script, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    path = explore(script.prompt, llm).show()
    assert opened == [path.as_uri()]
    assert path.read_text().startswith("<!doctype html>")


def check_counts(found: trace.Trace) -> None:
    """The figures of the steps are those of the statistics."""
    stats = found.stats
    assert sum(len(step.emitted) for step in found.steps) == stats["tokens"]
    assert len(found.steps) == stats["steps"]
    assert sum(step.drafted for step in found.steps) == stats["drafted"]
    assert sum(len(step.accepted) for step in found.steps) == stats["accepted"]
    assert curves.accepted_by_source(found) == stats["accepted_by_source"]
    shares = stats["acceptance_by_depth"]
    deep = curves.acceptance_by_depth(found.steps)
    assert deep == pytest.approx(shares[: len(deep)])
    assert not any(shares[len(deep) :])


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_the_statistics(seed, completion):
    check_counts(random_trace(30, seed=seed))
    check_counts(completion.trace)


def test_void_nodes_leave_no_gap():
    """Numbers of the nodes that are there, against a walk over the record."""
    request = random_request(12)
    found = build.trace_of(request, "", "")
    assert any(np.isinf(record.log_prob).any() for record in request.records)
    for step, record in zip(found.steps, request.records, strict=True):
        spelled = {0: (int(record.tokens[0]),)}
        for node in range(1, len(record.parents)):
            above = spelled.get(int(record.parents[node]))
            if above and record.log_prob[node] > -np.inf:
                spelled[node] = (*above, int(record.tokens[node]))
        ours = {0: (step.tokens[0],)}
        for node in range(1, len(step.parents)):
            ours[node] = (*ours[step.parents[node]], step.tokens[node])
        assert list(ours.values()) == list(spelled.values())
        if step.path:
            assert ours[step.path[-1]] == spelled[record.accepted[-1]]


def test_json_round_trip(tmp_path, completion):
    line = trace.Timeline(("a", " b"), ((0.1, 1), (0.25, 1)))
    traces = [
        random_trace(7),
        dataclasses.replace(
            completion.trace,
            replay={"tree": line, "plain": line},
            parts={"draft": 0.1, "target": 0.2, "rest": 0.05},
        ),
        random_trace(0),
    ]
    trace.write(traces, tmp_path / "t.json")
    assert trace.read(tmp_path / "t.json") == traces


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda values: values.pop("format"), "is not a trace"),
        (lambda values: values.update(version=2), "version 2"),
        (lambda values: values["traces"][0].pop("steps"), "damaged"),
        (lambda values: values["traces"][0]["steps"]["tokens"].pop(), "damaged"),
    ],
)
def test_files_that_are_no_trace(tmp_path, change, expected):
    values = json.loads(trace.dumps([random_trace(3)]))
    change(values)
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=expected):
        trace.read(tmp_path / "t.json")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="check the path"):
        trace.read(tmp_path / "no.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match="is not a trace"):
        trace.read(tmp_path / "t.json")


def test_names_of_files(tmp_path):
    for name, expected in (("run.pdf", "must end in"), ("no/run.html", "no such")):
        with pytest.raises(UserError, match=expected):
            files.check(tmp_path / name)
    assert files.check(tmp_path / "run.html") == tmp_path / "run.html"


def test_rows_of_a_layout():
    """Leaves have rows of their own, in order; parents stand between their children."""
    for step in random_trace(20).steps:
        where = curves.layout(step)
        parents = list(step.parents)
        if step.has_bonus:
            parents.append(step.path[-1] if step.path else 0)
        assert len(where) == len(parents)
        children = [[] for _ in parents]
        for node in range(1, len(parents)):
            children[parents[node]].append(node)
            assert where[node][0] == where[parents[node]][0] + 1
        leaves = [row for node, (_, row) in enumerate(where) if not children[node]]
        assert sorted(leaves) == list(range(len(leaves)))
        for node, below in enumerate(children):
            rows = [where[child][1] for child in below]
            assert rows == sorted(rows)
            if rows:
                assert rows[0] <= where[node][1] <= rows[-1]


def test_estimates_that_came_true():
    """Two nodes below the root, one of them accepted, and one below the other."""
    step = trace.Step(
        parents=(0, 0, 0, 2),
        tokens=(5, 6, 7, 8),
        sources=(0, 0, 0, 0),
        draft_log_prob=(0.0, math.log(0.72), math.log(0.24), math.log(0.9)),
        target_log_prob=(0.0, math.log(0.6), math.log(0.3), math.log(0.5)),
        path=(1,),
        emitted=(6, 9),
        emitted_log_prob=(math.log(0.6), -1.0),
        pieces=("", ""),
        drafted=3,
        dispatch=0,
    )
    low, high = curves.reliability([step, step])
    assert (low["nodes"], low["accepted"]) == (2, 0)
    assert (high["nodes"], high["accepted"]) == (2, 1)
    assert low["estimate"] == pytest.approx(0.24)
    assert high["target"] == pytest.approx(0.6)


def test_trees_as_text():
    """A line a node, indented by its depth; colours only where they are wanted."""
    found = random_trace(6)
    shown = TreeText(found.vocabulary.__getitem__, found.sources)
    for number, step in enumerate(found.steps, 1):
        head, root, *lines = shown.step(number, step).splitlines()
        assert head.startswith(f"step {number}: {len(step.parents) - 1} nodes")
        assert root == f"○ #{step.tokens[0]}"
        assert len(lines) == len(step.parents) - 1 + step.has_bonus
        depths = [depth for depth, _ in curves.layout(step)]
        marks = [max(map(line.find, "✓·+")) // 3 for line in lines]
        assert sorted(marks) == sorted(depths[1:])
        assert sum("✓" in line for line in lines) == len(step.path)
        assert sum("+ " in line for line in lines) == step.has_bonus
    assert "\033" not in shown.step(1, found.steps[0])
    coloured = dataclasses.replace(shown, colour=True).step(1, found.steps[0])
    assert "\033[" in coloured


def test_pictures(tmp_path):
    found = random_trace(40, nodes=12, depth=3)
    files.save([found], tmp_path / "t.png")
    data = (tmp_path / "t.png").read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">I", data[16:20])[0] > 1000
    files.save([found], tmp_path / "t.svg")
    assert "<svg" in (tmp_path / "t.svg").read_text()


def test_steps_that_a_picture_shows():
    """The fewest tokens, the median and the most."""
    steps = random_trace(40, nodes=12, depth=3).steps
    counts = sorted(len(step.emitted) for step in steps)
    chosen = [len(steps[n].emitted) for n in figure.chosen_steps(steps)]
    assert sorted(chosen) == [counts[0], counts[20], counts[-1]]
    assert figure.chosen_steps(steps[:2]) == [0, 1]
    # Plain decoding has no tree to show.
    plain = random_trace(5, nodes=1, depth=1)
    assert figure.chosen_steps(plain.steps) == []
    assert figure.draw(plain).axes
