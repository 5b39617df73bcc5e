"""treespec generate_answers: from flags to a folder of texts."""

from __future__ import annotations

import json

import pytest

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
