"""scripts/generate.py: texts, the table, JSON and precedence of settings."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.scripts.support import CONFIG
from treespec_jax import LLM, speculation
from treespec_jax.config import SpeculativeConfig
from treespec_jax.measurement import exactness, rounds

pytestmark = pytest.mark.slow


def test_one_prompt(generate):
    result = generate("--prompt=the cat", "--max_tokens=9")
    assert result.out.startswith("the cat") and result.out.endswith("\n\n")
    for label in (
        "tokens per step",
        "acceptance by depth",
        "accepted by rank",
        "first token",
    ):
        assert label in result.err and label not in result.out
    rows = result.err.splitlines()
    assert [s.split() for s in rows if s.startswith("tokens  ")] == [["tokens", "9"]]


def test_empty_prompt(generate):
    """The token that begins every text is enough."""
    out = json.loads(generate("--prompt=", "--max_tokens=9", "--json").out)
    (completion,) = out["completions"]
    assert completion["prompt"] == ""
    assert len(completion["token_ids"]) == 9


def test_json(generate):
    out = generate("--prompt=a dog", "--max_tokens=6", "--json", "--logprobs").out
    report = json.loads(out)
    (completion,) = report["completions"]
    assert completion["prompt"] == "a dog"
    assert len(completion["token_ids"]) == len(completion["logprobs"]) == 6
    assert completion["finish_reason"] == "length"
    assert all(p <= 0 for p in completion["logprobs"])
    assert report["settings"]["speculative"]["tree"] == "chain:2"
    assert report["settings"]["dtype"] == "float32"
    assert report["settings"]["engine"]["max_len"] == 64
    assert report["settings"]["engine"]["max_batch"] == 1
    assert report["stats"]["tokens"] == 6
    assert len(report["stats"]["acceptance_by_depth"]) == 2
    assert report["stats"]["acceptance_by_rank"] in ([], [1.0])
    assert report["timing"]["first_token_seconds"] > 0
    assert report["comparison"] is None


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_compare_is_identical(generate, temperature):
    out = generate(
        "--prompt=one day",
        "--max_tokens=12",
        "--compare",
        "--json",
        f"--temperature={temperature}",
        "--seed=3",
    ).out
    comparison = json.loads(out)["comparison"]
    assert comparison["identical"] and comparison["first_difference"] is None
    assert comparison["tokens_per_second"] > 0
    assert comparison["plain_tokens_per_second"] > 0


def test_compare_in_words(generate):
    """The last line says what was gained; no other speed than the compared ones."""
    args = ["--prompt=one day", "--max_tokens=12"]
    result = generate(*args, "--compare")
    assert result.err.count("tok/s") == 2
    said = result.err.splitlines()[-1]
    assert "tokens per pass of the target" in said
    assert "times the speed of plain decoding" in said
    assert said.endswith("The tokens are identical to plain decoding.")
    quiet = generate(*args, "--quiet")
    assert quiet.err == "" and quiet.out == result.out


def test_verify_lossless(generate):
    """The probe comes first, the verdict last."""
    args = ["--prompt=one day", "--max_tokens=12", "--verify_lossless"]
    lines = generate(*args).err.splitlines()
    assert sum(line.startswith("one row against 3: ") for line in lines) == 1
    assert lines[-1] == "Lossless: 12 of 12 tokens equal plain decoding; near ties: 0."


def test_every_text_of_a_prompt_is_verified(generate, monkeypatch):
    """Beside the plain text of its seed, wherever `best_of` puts it."""
    args = ["--prompt=one day", *SAMPLED, "--n=2", "--best_of=3", "--json"]
    given = []
    verdict = exactness.verdict

    def watched(llm, texts, probed):
        given.extend(texts)
        return verdict(llm, texts, probed)

    monkeypatch.setattr(exactness, "verdict", watched)
    report = json.loads(generate(*args, "--verify_lossless").out)
    (completion,) = report["completions"]
    assert [(t.params.seed, list(t.tree)) for t in given] == others(completion)
    assert [t.prompt for t in given] == ["0 [1]", "0 [2]"]
    assert report["exactness"]["equal"] == report["exactness"]["tokens"] == 12
    assert report["comparison"]["identical"]


def test_a_difference_that_is_no_tie_ends_with_code_1(run_script, files, monkeypatch):
    """In two lines that say where, even with --quiet; JSON has all."""

    def wrong(llm, prompts, *rest, **more):
        generation, seconds = decode(llm, prompts, *rest, **more)
        if not llm.engine.speculation.depth:
            (text,) = generation
            ids = [*text.token_ids[:4], 5, 6]
            texts = [dataclasses.replace(text, token_ids=ids)]
            generation = dataclasses.replace(generation, completions=texts)
        return generation, seconds

    decode = rounds.decode
    monkeypatch.setattr(rounds, "decode", wrong)
    args = [f"--target={files.target}", f"--draft={files.draft}", "--tree=chain:2"]
    args += ["--max_len=64", "--ignore_eos", "--prompt=one day", "--max_tokens=6"]
    result = run_script("generate.py", *args, "--verify_lossless", "--quiet", "--json")
    assert result.code == 1
    found = json.loads(result.out)["exactness"]
    assert not found["lossless"] and (found["equal"], found["tokens"]) == (4, 6)
    assert found["differences"][0]["position"] == 4 and found["probe"]["rows"] == 3
    first, second = result.err.splitlines()
    assert first.startswith("NOT LOSSLESS: 1 of the texts")
    assert second.startswith("prompt 0, token 4 is ") and "NO near tie" in second


def by_index(record):
    return record["index"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_file(generate, tmp_path, name):
    prompts = ["the cat", "a", "once upon a time"]
    lines = [
        json.dumps({"prompt": p}) if name.endswith("jsonl") else p for p in prompts
    ]
    (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    flags = [f"--prompts_file={tmp_path / name}", "--max_tokens=4", "--max_batch=2"]
    *lines, last = generate(*flags, "--json", tree="none").out.splitlines()
    report, completions = json.loads(last), sorted(map(json.loads, lines), key=by_index)
    assert [c["prompt"] for c in completions] == prompts
    assert report["stats"]["requests"] == 3 and "completions" not in report
    alone = json.loads(
        generate("--prompt=a", "--max_tokens=4", "--json", tree="none").out
    )
    assert completions[1]["token_ids"] == alone["completions"][0]["token_ids"]
    result = generate(*flags, tree="none")
    assert all(f"> {prompt}\n" in result.out for prompt in prompts)
    assert "3/3" in result.err and "tokens per step" in result.err


def others(completion):
    """The tokens and seeds of a record's texts."""
    texts = [completion, *completion["others"]]
    return [(text["seed"], text["token_ids"]) for text in texts]


SAMPLED = ("--max_tokens=6", "--temperature=1", "--seed=5")


def test_several_texts_of_a_prompt(generate):
    """Each is what its seed gives alone; as text they are numbered."""
    report = json.loads(generate("--prompt=a cat", *SAMPLED, "--n=3", "--json").out)
    (completion,) = report["completions"]
    found = others(completion)
    assert [seed for seed, _ in found] == [5, 6, 7]
    assert "prompt" not in completion["others"][0]
    assert report["stats"]["tokens"] == 18 and report["stats"]["requests"] == 3
    assert report["settings"]["engine"]["max_batch"] == 3
    last = json.loads(generate("--prompt=a cat", *SAMPLED, "--seed=7", "--json").out)
    assert last["completions"][0]["token_ids"] == found[2][1]
    lines = generate("--prompt=a cat", *SAMPLED, "--n=3").out.splitlines()
    assert lines[0] == "> a cat"
    texts = [completion["text"], *(text["text"] for text in completion["others"])]
    numbered = [line for line in lines if line.startswith("[")]
    assert numbered == [f"[{i}] {text.strip()}" for i, text in enumerate(texts, 1)]


def test_several_texts_of_many_prompts(generate, tmp_path):
    """A line of answers per prompt, of all its texts; a line may ask by itself."""
    rows = [{"prompt": "a cat"}, {"prompt": "the dog", "n": 1, "best_of": 3, "id": 7}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "a.jsonl"
    args = [f"--prompts_file={tmp_path / 'p.jsonl'}", f"--output={output}", *SAMPLED]
    args += ["--n=2", "--max_batch=2"]
    generate(*args)
    lines = sorted(map(json.loads, output.read_text().splitlines()), key=by_index)
    assert [line["index"] for line in lines] == [0, 1] and lines[1]["id"] == 7
    assert [(x["sampling"]["n"], x["sampling"]["best_of"]) for x in lines] == [
        (2, None),
        (1, 3),
    ]
    assert [seed for seed, _ in others(lines[0])] == [5, 6]
    # The likeliest of the seeds from its own on; one is returned.
    assert lines[1]["seed"] in (7, 8, 9) and "others" not in lines[1]
    every = generate("--prompt=the dog", *SAMPLED, "--seed=7", "--n=3", "--json",
                     "--logprobs").out  # fmt: skip
    (completion,) = json.loads(every)["completions"]
    means = {
        text["seed"]: np.mean(text["logprobs"])
        for text in (completion, *completion["others"])
    }
    assert lines[1]["seed"] == max(means, key=means.get)
    done = generate(*args, "--resume")
    assert "all 2 answers" in done.err


def test_flag_wins_over_override_wins_over_file(generate, tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    out = generate(
        f"--config={tmp_path / 'c.py'}",
        "--config.sampling.seed=2",
        "--config.sampling.top_k=8",
        "--top_k=9",
        "--prompt=a",
        "--json",
        tree="",
    ).out
    report = json.loads(out)
    settings = report["settings"]
    assert settings["speculative"]["tree"] == "none"
    assert settings["sampling"]["max_tokens"] == 5 == report["stats"]["tokens"]
    assert settings["sampling"]["seed"] == 2
    assert settings["sampling"]["top_k"] == 9


def test_penalties_and_bias(generate):
    """By flags; the banned token never comes."""
    args = ["--prompt=the cat", "--max_tokens=16", "--json"]
    free = json.loads(generate(*args, tree="none").out)["completions"][0]["token_ids"]
    banned = max(free, key=free.count)
    out = generate(
        *args,
        f"--logit_bias={banned}=-100",
        "--logit_bias=280=1.5",
        "--repetition_penalty=1.3",
        "--presence_penalty=0.5",
        "--frequency_penalty=0.25",
        tree="none",
    ).out
    report = json.loads(out)
    sampling = report["settings"]["sampling"]
    assert [banned, -100.0] in sampling["logit_bias"] and len(
        sampling["logit_bias"]
    ) == 2
    assert sampling["repetition_penalty"] == 1.3
    assert sampling["presence_penalty"] == 0.5
    assert sampling["frequency_penalty"] == 0.25
    (completion,) = report["completions"]
    assert banned not in completion["token_ids"] != free


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_a_cascade_is_labelled_lossy(generate, temperature):
    args = ["--prompt=the cat", "--max_tokens=16", "--rule=token", "--ignore_eos"]
    args += ["--cascade=opt", "--alpha=0.3", f"--temperature={temperature}"]
    report = json.loads(generate(*args, "--json").out)
    for stats in (report["stats"], report["completions"][0]["stats"]):
        assert (stats["cascade"], stats["alpha"]) == ("opt", 0.3)
        assert stats["rule"] == "token" and stats["lossless"] is False
    assert "token (lossy: cascade opt, 0.3)" in generate(*args).err


def test_recycled_successors_go_on_in_the_next_run(run_script, files, tmp_path):
    """Written at the end, read at the start; the text stays, and steps are saved."""
    table = tmp_path / "t.npz"
    args = [f"--target={files.target}", "--method=auto", "--tree=chain:2"]
    args += [f"--recycle_table={table}", "--prompt=the cat", "--max_len=64"]
    args += ["--max_tokens=24", "--ignore_eos"]
    first = run_script("generate.py", *args, "--json", "--quiet")
    assert first.code == 0
    assert first.err == f"note: {table} is not there yet: nothing to recycle at first\n"
    with np.load(table) as arrays:
        before = arrays["logits"].copy()
    second = run_script("generate.py", *args)
    assert second.code == 0 and "note: " not in second.err
    cold = json.loads(first.out)
    assert cold["settings"]["speculative"]["recycle_table"] == str(table)
    assert second.out.startswith("the cat" + cold["completions"][0]["text"])
    stats = cold["stats"]
    assert list(stats["accepted_by_source"]) == list(
        speculation.make(SpeculativeConfig(method="auto")).drafter.sources
    )
    assert sum(stats["accepted_by_source"].values()) == stats["accepted"] > 0
    rows = [line.split() for line in second.err.splitlines()]
    (steps,) = (int(row[1]) for row in rows if row[:1] == ["steps"])
    assert steps < stats["steps"]
    (shares,) = (row for row in rows if row[:3] == ["accepted", "by", "source"])
    assert "recycle" in shares and shares[-1] == "%"
    with np.load(table) as arrays:
        known = before > -np.inf
        assert known.any() and (arrays["logits"][known] > -np.inf).all()


def test_plain_decoding_needs_no_drafter(run_script, files):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--max_len=64"]
    result = run_script("generate.py", *args, "--max_tokens=3", "--ignore_eos")
    assert result.code == 0
    assert "acceptance by depth" in result.err


def test_settings_of_a_text(generate):
    """Each flag reaches the text or its report."""
    args = ["--prompt=a dog", "--max_tokens=6", "--json", "--seed=-1", "--logprobs=2"]
    args += ["--temperature=1", "--bad_words=a", "--bad_words=b", "--prompt_logprobs=1"]
    args += ["--allowed_token_ids=" + ",".join(map(str, range(259, 280)))]
    report = json.loads(generate(*args, "--min_tokens=6", "--top_k=-1").out)
    (completion,) = report["completions"]
    sampling = report["settings"]["sampling"]
    assert completion["seed"] == sampling["seed"] >= 0 and sampling["top_k"] == 0
    assert sampling["bad_words"] == ["a", "b"] and sampling["min_tokens"] == 6
    assert len(completion["token_ids"]) == 6
    assert set(completion["token_ids"]) <= set(range(261, 280))
    assert not set(completion["text"]) & set("ab")
    for some, token in zip(
        completion["top_logprobs"], completion["token_ids"], strict=True
    ):
        assert token in [one["token_id"] for one in some] and len(some) in (2, 3)
        assert some[0]["logprob"] >= some[1]["logprob"] and some[0]["rank"] == 1
    assert completion["prompt_logprobs"][0] is None
    prompts = completion["prompt_top_logprobs"], completion["prompt_logprobs"]
    # A token that begins the text, and a space in front of the first word.
    assert (
        list(map(len, prompts)) == [len(completion["prompt_token_ids"])] * 2 == [7] * 2
    )


def test_a_tokenizer_by_its_path(files):
    """As the flag: the checkpoint has none."""
    bare = dict(speculative=None, max_len=64, max_batch=1)
    llm = LLM(files.bare, tokenizer=files.tokenizer, **bare)
    assert llm.tokenizer.decode(llm.tokenizer.encode("a dog")) == "a dog"
    assert LLM(files.bare, **bare).tokenizer is None


def test_tokenizer_by_flag_and_stop(run_script, files):
    args = [f"--target={files.bare}", "--tree=none", "--prompt=a", "--max_len=64"]
    args += [f"--tokenizer={files.tokenizer}", "--max_tokens=20", "--ignore_eos"]
    whole = json.loads(run_script("generate.py", *args, "--json").out)
    text = whole["completions"][0]["text"]
    stop = next(c for c in text[3:] if c.isprintable() and c != "\ufffd")
    cut = json.loads(run_script("generate.py", *args, "--json", f"--stop={stop}").out)
    assert cut["completions"][0]["text"] == text[: text.index(stop)]
    assert cut["completions"][0]["finish_reason"] == "stop"
