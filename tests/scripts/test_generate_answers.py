"""treespec generate_answers: from flags to a folder of texts."""

from __future__ import annotations

import contextlib
import json
import threading

import pytest

from treespec_jax import LLM
from treespec_jax.training import resuming
from treespec_jax.training.answers import read_answers

SIZES = ("--max_tokens=6", "--page_size=8", "--steps_per_dispatch=2")


@pytest.mark.slow
def test_stories_and_questions_in_one_folder(run_script, refuses, files, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a dog"}\n{"question": "why"}\n')
    output = tmp_path / "texts"
    given = [f"--target={files.target}", f"--prompts_file={tmp_path / 'asked.jsonl'}"]
    given += ["--stories=3", *SIZES, f"--output={output}"]
    told = run_script("generate_answers", *given, "--max_batch=8")
    assert told.code == 0, told
    found = read_answers(output)
    tokens = len(found.tokens) - found.prompt_tokens.sum()
    assert told.out.startswith(f"{tokens} tokens in 5 texts in ")
    assert f"{output} holds {len(found.tokens)} tokens in 5 texts" in told.out
    assert found.sources == ("asked.jsonl",) * 2 + ("stories",) * 3
    assert found.temperatures.tolist() == [0, 1, 1, 1, 1]
    identity = json.loads((output / "metadata.json").read_text())["identity"]
    # Room for the longest prompt, 6 tokens, and its text.
    assert identity["max_len"] == 16 and identity["target"] == "target"
    again = run_script("generate_answers.py", *given, "--max_batch=4")
    assert again.out.startswith("0 tokens in 0 texts in ")
    refuses("holds a run with seed=0, not 1", "generate_answers", *given, "--seed=1")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def speculating(run_script, files):
    """Writes four stories by a pair, into a folder."""

    def run(output, *more):
        pair = [f"--target={files.target}", f"--draft={files.draft}", "--tree=chain:2"]
        sampled = ["--stories=4", "--ignore_eos", "--max_batch=2", *SIZES]
        return run_script(
            "generate_answers.py", *pair, *sampled, f"--output={output}", *more
        )

    return run


@pytest.mark.slow
def test_what_a_run_writes_is_verified(speculating, tmp_path):
    """Only that, whatever the folder holds, and the folder stays as it would be."""
    plainly = speculating(tmp_path / "unchecked")
    assert "Lossless" not in plainly.err
    output = tmp_path / "texts"
    told = speculating(output, "--verify_lossless")
    last = told.err.splitlines()[-1]
    assert last == "Lossless: 24 of 24 tokens equal plain decoding; near ties: 0."
    assert told.code == 0 and "one row against 3: " in told.err
    written = contents(output)
    assert written == contents(tmp_path / "unchecked")
    # A run that was killed in front of its last text.
    lines = (output / "texts-0-of-1.jsonl").read_text().splitlines(keepends=True)
    (output / "texts-0-of-1.jsonl").write_text("".join(lines[:-1]))
    told = speculating(output, "--verify_lossless")
    assert told.err.splitlines()[-1].startswith("Lossless: 6 of 6 tokens")
    assert contents(output) == written
    told = speculating(output, "--verify_lossless")
    assert told.code == 0 and "this run wrote no text" in told.err.splitlines()[-1]


@pytest.mark.slow
def test_a_text_that_is_another_ends_with_code_1(speculating, tmp_path, monkeypatch):
    """It is named, and written nevertheless."""

    def wrong(llm, *given, **more):
        generation = true(llm, *given, **more)
        ids = generation[2].token_ids
        ids[4] = (ids[4] + 1) % 250
        return generation

    true = LLM.generate
    monkeypatch.setattr(LLM, "generate", wrong)
    told = speculating(tmp_path / "texts", "--verify_lossless")
    assert told.code == 1 and "holds 28 tokens in 4 texts" in told.out
    *_, first, second = told.err.splitlines()
    assert first.startswith("NOT LOSSLESS: 1 of the texts")
    assert "22 of 24 tokens" in first
    assert second.startswith("prompt 2, token 4 is ") and "NO near tie" in second


@pytest.mark.slow
def test_an_interrupted_run_is_not_compared(speculating, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def at_once():
        wanted = threading.Event()
        wanted.set()
        yield wanted

    monkeypatch.setattr(resuming, "interruption", at_once)
    told = speculating(tmp_path / "texts", "--verify_lossless")
    assert told.code == 0 and "the same command goes on" in told.out
    assert told.err.splitlines()[-1].startswith("interrupted: the texts of this run")


def test_what_cannot_be_verified_is_refused(refuses, files, tmp_path):
    given = [f"--target={files.target}", f"--draft={files.draft}", "--stories=4"]
    given += [f"--output={tmp_path / 'new'}", "--verify_lossless"]
    name = "generate_answers.py"
    refuses(
        "decoding is plain (--max_batch=32); give --tree", name, *given[:1], *given[2:]
    )
    given += ["--tree=chain:2"]
    refuses("take --rule=exact", name, *given, "--rule=token")
    assert not (tmp_path / "new").exists()


def test_mistakes_are_one_line(run_script, refuses, files, tmp_path):
    given = ["generate_answers", f"--target={files.target}", f"--output={tmp_path}"]
    refuses("nothing to ask for", *given)
    refuses("the target has no chat template", *given, "--dialogues=5")
    refuses("--shard=half", *given, "--stories=1", "--shard=half")
    refuses("--temperatures=hot", *given, "--stories=1", "--temperatures=hot")
    refuses("no output folder", *given[:2], "--stories=1")
    (tmp_path / "asked.txt").write_text("abc " * 9)
    given += [f"--prompts_file={tmp_path / 'asked.txt'}", "--max_len=16"]
    told = run_script(*given)
    assert told.code == 2 and "no prompt has room in max_len=16" in told.err
