"""scripts/generate.py: texts, the table, JSON, precedence of settings, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.scripts.support import SCRIPTS
from treespec_jax import checkpoints, speculation
from treespec_jax.commands import loading, runtime
from treespec_jax.config import SpeculativeConfig
from treespec_jax.tracing import trace

pytestmark = pytest.mark.slow

CONFIG = """
from treespec_jax.commands.settings import default_config

def get_config():
    config = default_config()
    config.speculative.tree = "none"
    config.sampling.max_tokens = 5
    config.sampling.top_k = 7
    config.sampling.seed = 1
    return config
"""


@pytest.fixture
def generate(run_script, files):
    """Runs the script on the tiny pair, with a small chain and few tokens."""

    def run(*args: str, tree: str = "chain:2"):
        given = [f"--target={files.target}", f"--draft={files.draft}"]
        given += ["--max_len=64", "--ignore_eos"]
        if tree:
            given.append(f"--tree={tree}")
        result = run_script("generate.py", *given, *args)
        assert result.code == 0, result.err
        return result

    return run


def test_one_prompt(generate):
    out = generate("--prompt=the cat", "--max_tokens=9").out
    assert out.startswith("the cat")
    for label in (
        "tokens per step",
        "acceptance by depth",
        "accepted by rank",
        "first token",
    ):
        assert label in out
    assert [s.split() for s in out.splitlines() if s.startswith("tokens  ")] == [
        ["tokens", "9"]
    ]


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
    out = generate("--prompt=one day", "--max_tokens=12", "--compare").out
    assert "tokens are identical to plain decoding" in out


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_file(generate, tmp_path, name):
    prompts = ["the cat", "a", "once upon a time"]
    lines = [
        json.dumps({"prompt": p}) if name.endswith("jsonl") else p for p in prompts
    ]
    (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    flags = [f"--prompts_file={tmp_path / name}", "--max_tokens=4", "--max_batch=2"]
    report = json.loads(generate(*flags, "--json", tree="none").out)
    assert [c["prompt"] for c in report["completions"]] == prompts
    assert report["stats"]["requests"] == 3
    alone = json.loads(
        generate("--prompt=a", "--max_tokens=4", "--json", tree="none").out
    )
    assert report["completions"][1]["token_ids"] == alone["completions"][0]["token_ids"]
    out = generate(*flags, tree="none").out
    assert all(f"> {prompt}\n" in out for prompt in prompts)


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
    assert "token (lossy: cascade opt, 0.3)" in generate(*args).out


def test_recycled_successors_go_on_in_the_next_run(run_script, files, tmp_path):
    """Written at the end, read at the start; the text stays, and steps are saved."""
    table = tmp_path / "t.npz"
    args = [f"--target={files.target}", "--method=auto", "--tree=chain:2"]
    args += [f"--recycle_table={table}", "--prompt=the cat", "--max_len=64"]
    args += ["--max_tokens=24", "--ignore_eos"]
    first = run_script("generate.py", *args, "--json")
    assert first.code == 0
    assert first.err == f"note: {table} is not there yet: nothing to recycle at first\n"
    with np.load(table) as arrays:
        before = arrays["logits"].copy()
    second = run_script("generate.py", *args)
    assert second.code == 0 and second.err == ""
    cold = json.loads(first.out)
    assert cold["settings"]["speculative"]["recycle_table"] == str(table)
    assert second.out.startswith("the cat" + cold["completions"][0]["text"])
    stats = cold["stats"]
    assert list(stats["accepted_by_source"]) == list(
        speculation.make(SpeculativeConfig(method="auto")).drafter.sources
    )
    assert sum(stats["accepted_by_source"].values()) == stats["accepted"] > 0
    rows = [line.split() for line in second.out.splitlines()]
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
    assert "acceptance by depth" in result.out


def test_tokenizer_by_flag_and_stop(run_script, files):
    args = [f"--target={files.bare}", "--tree=none", "--prompt=a", "--max_len=64"]
    args += [f"--tokenizer={files.tokenizer}", "--max_tokens=20", "--ignore_eos"]
    whole = json.loads(run_script("generate.py", *args, "--json").out)
    text = whole["completions"][0]["text"]
    stop = next(c for c in text[3:] if c.isprintable() and c != "\ufffd")
    cut = json.loads(run_script("generate.py", *args, "--json", f"--stop={stop}").out)
    assert cut["completions"][0]["text"] == text[: text.index(stop)]
    assert cut["completions"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max_tokens=0", "max_tokens"),
        ("--temperature=-1", "temperature"),
        ("--temperature=nan", "nan"),
        ("--temperature=warm", "warm"),
        ("--top_p=0", "top_p"),
        ("--top_p=1.5", "1.5"),
        ("--top_k=-1", "top_k"),
        ("--min_p=2", "min_p"),
        ("--seed=-1", "seed"),
        ("--stop=", "stop"),
        ("--repetition_penalty=0", "repetition_penalty"),
        ("--presence_penalty=3", "presence_penalty"),
        ("--frequency_penalty=-3", "frequency_penalty"),
        ("--logit_bias=5", "--logit_bias='5'"),
        ("--logit_bias=99999=1", "99999"),
        ("--rule=tokn", "tokn"),
        ("--cascade=chao", "chao"),
        ("--alpha=2", "alpha"),
        ("--max_batch=0", "max_batch"),
        ("--page_size=7", "page_size"),
        ("--steps_per_dispatch=0", "steps_per_dispatch"),
        ("--max_len=1", "max_len"),
        ("--max_len=4000", "max_len"),
        ("--dtype=int8", "int8"),
        ("--cache_dtype=int4", "int4"),
        ("--mesh=tensor:4096", "asks for 4096 devices"),
        ("--tree=regular:0", "regular:0"),
        ("--tree=chain:-1", "chain:-1"),
        ("--tree=chain:5000", "5000"),
        ("--tree=dynamic:3@4", "dynamic:3@4"),
        ("--prompts_file=x.txt", "both"),
        ("--temprature=1", "temprature"),
        ("--target=/no/such/folder", "no target at /no/such/folder"),
        ("--draft=/no/such/folder", "/no/such/folder"),
        ("--tokenizer=/no/such/file", "/no/such/file"),
        ("--config=/no/such/config.py", "/no/such/config.py"),
        ("--config.speculative.tree=none", "config.speculative.tree"),
        ("--recycle_table=t.npz", "of no use to method 'draft_model'"),
        ("stray", "stray"),
    ],
)
def test_bad_flags(refuses, files, flag, expected):
    args = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=the cat"]
    refuses(expected, "generate.py", *args, flag)


@pytest.mark.parametrize(
    ("lines", "override", "expected"),
    [
        ("config.speculative.tree = 'bush:3'", "", "bush:3"),
        ("config.forest = 1", "", "forest"),
        ("config.sampling.warmth = 1", "", "warmth"),
        ("config.sampling.top_p = 3.0", "", "top_p"),
        ("", "--config.forest=1", "forest"),
        ("", "--config.sampling.max_tokens=0", "max_tokens"),
        ("", "--config.sampling.max_tokens=few", "few"),
        ("config = 3", "", "ConfigDict"),
        ("return {}[1]", "", "1"),
        ("config = (", "", "config.py"),
    ],
)
def test_bad_configuration(refuses, files, tmp_path, lines, override, expected):
    source = CONFIG.replace('config.speculative.tree = "none"', lines or "pass")
    (tmp_path / "config.py").write_text(source)
    if lines == "config = 3":
        (tmp_path / "config.py").write_text("def get_config():\n    return 3\n")
    args = [f"--config={tmp_path / 'config.py'}", f"--target={files.target}"]
    args += [f"--draft={files.draft}", "--prompt=a", *([override] if override else [])]
    refuses(expected, "generate.py", *args)


def test_bad_options_and_tables(refuses, files, tmp_path, monkeypatch):
    """Found before weights are read, and tables before jax starts."""
    monkeypatch.setattr(loading, "make_llm", lambda *_: pytest.fail("weights"))
    args = [f"--target={files.target}", "--method=recycle", "--prompt=a"]
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: pytest.fail("weights"))
    for option, expected in (
        ("scope=all", "scope 'all' is unknown"),
        ("longest=3", "'longest' in options of method 'recycle'"),
        ("successors=0", "successors must be a whole number >= 1"),
    ):
        refuses(expected, "generate.py", *args, f"--drafter_option={option}")
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    (tmp_path / "t.npz").write_text("no table")
    for path, expected in (
        ("t.npz", "is no recycle table"),
        ("no/t.npz", "cannot write"),
        (".", "Is a directory"),
    ):
        refuses(expected, "generate.py", *args, f"--recycle_table={tmp_path / path}")
    table = ["--drafter_option=scope=request", f"--recycle_table={tmp_path / 'n.npz'}"]
    refuses("scope=request", "generate.py", *args, *table)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_unknown_keys_of_a_handmade_configuration(refuses, tmp_path):
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'engine': {'max_size': 3}})\n"
    )
    refuses("max_size", "generate.py", f"--config={tmp_path / 'c.py'}", "--prompt=a")


def test_bad_files(refuses, files, tmp_path):
    pair = [f"--target={files.target}", f"--draft={files.draft}"]
    refuses("neither", "generate.py", *pair)
    for name, text, expected in [
        ("none.txt", None, "none.txt"),
        ("empty.txt", " \n", "empty"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "bad.jsonl:2"),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        refuses(expected, "generate.py", *pair, f"--prompts_file={tmp_path / name}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    refuses("UTF-8", "generate.py", *pair, f"--prompts_file={tmp_path / 'bytes.txt'}")


def test_bad_checkpoints(refuses, files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.bin").write_bytes(b"abc")
    a = "--prompt=a"
    for name in ("empty", "short.bin"):
        target = f"--target={tmp_path / name}"
        refuses(name, "generate.py", target, "--tree=none", a)
    target = f"--target={files.target}"
    refuses("--draft", "generate.py", target, "--method=draft_model", a)
    refuses("no target at /no/such", "generate.py", "--target=/no/such", a)
    refuses("vocabular", "generate.py", target, f"--draft={files.foreign}", a)
    bare = f"--target={files.bare}"
    refuses("--tokenizer", "generate.py", bare, "--tree=none", a)


def test_mistakes_are_found_before_jax_starts(refuses, files, monkeypatch):
    """Everything that configuration and tokenizer can tell."""
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    plain = [f"--target={files.target}", "--tree=none", "--prompt=the cat"]
    pair = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=the cat"]
    refuses(
        "max_len is 16", "generate.py", *plain, "--max_len=16", f"--prompt={'a' * 40}"
    )
    refuses("positions", "generate.py", *plain, "--max_len=4000")
    deep = ["--tree=chain:300", "--max_len=300"]
    refuses("depth 300 does not fit max_len=300", "generate.py", *pair, *deep)
    refuses("depth 300", "generate.py", *pair, "--tree=chain:300")
    refuses("token 259", "generate.py", *pair, f"--draft={files.foreign}")
    refuses("--tokenizer", "generate.py", *plain, f"--target={files.bare}")


def _run(*args: str):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "generate.py"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )


def test_own_process_answers_a_bad_flag(files):
    result = _run(f"--target={files.target}", "--prompt=a", "--tree=regular:0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_own_process_generates(run_script, files, compilation_cache):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--max_len=64"]
    args += ["--max_tokens=3", "--ignore_eos", "--json"]
    here = run_script("generate.py", *args)
    result = _run(*args, f"--compilation_cache={compilation_cache}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    ours, theirs = json.loads(here.out), json.loads(result.stdout)
    assert theirs["completions"][0]["token_ids"] == ours["completions"][0]["token_ids"]


# A program started in the background inherits that it ignores interrupts.
HEEDING_INTERRUPTS = [
    sys.executable,
    "-c",
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
]


def test_interruption_ends_the_text(files, compilation_cache):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--ignore_eos"]
    args += ["--max_tokens=200", f"--compilation_cache={compilation_cache}"]
    with subprocess.Popen(
        [*HEEDING_INTERRUPTS, str(SCRIPTS / "generate.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    ) as process:
        process.stdout.read(3)  # the prompt and a piece of its continuation
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"interrupted\n"
    assert out.endswith(b"\n") and b"tokens per step" not in out


def test_flags_are_checked_before_jax_starts():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['generate.py', '--prompt=a', '--max_tokens=0']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPTS / 'generate.py')!r}, run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    print(e.code, 'jax' in sys.modules, 'flax' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert result.stdout.split() == ["2", "False", "False"], result.stderr


def test_a_trace_has_the_counts_of_the_report(generate, tmp_path):
    """With a comparison, which is timed without recording."""
    args = ["--prompt=the cat", "--max_tokens=9", "--json", "--compare"]
    report = json.loads(generate(*args, f"--trace={tmp_path / 'run.json'}").out)
    assert report["comparison"]["identical"] and report["reliability"] is None
    (found,) = trace.read(tmp_path / "run.json")
    assert found.stats == report["stats"]
    (completion,) = report["completions"]
    assert found.text == completion["text"] and found.prompt == (("", "the cat"),)
    emitted = [token for step in found.steps for token in step.emitted]
    assert emitted == completion["token_ids"]
    assert found.settings["tree"] == "chain:2"
    assert set(found.parts) == {"draft", "target", "rest"}
    for line in found.replay.values():
        assert sum(count for _, count in line.arrivals) == len(line.pieces) == 9
        assert "".join(line.pieces) == found.text
    assert set(found.replay) == {"tree", "plain"}


def test_trees_in_the_terminal_and_pages(generate, tmp_path):
    page = tmp_path / "run.html"
    args = ["--prompt=the cat", "--max_tokens=5"]
    out = generate(*args, "--show_tree", f"--trace={page}").out
    assert out.startswith("step 1: 2 nodes") and "  drafter " in out
    assert f"trace: {page}" in out
    text = json.loads(generate(*args, "--json").out)["completions"][0]["text"]
    assert f"\nthe cat{text}\n" in out
    assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "p.txt").write_text("the cat\na\n")
    prompts = f"--prompts_file={tmp_path / 'p.txt'}"
    several = tmp_path / "two.json"
    args = [prompts, "--max_tokens=3", "--show_tree", f"--trace={several}"]
    assert generate(*args).out.count("step 1: ") == 2
    assert [t.prompt[0][1] for t in trace.read(several)] == ["the cat", "a"]


def test_pictures_that_cannot_be(refuses, monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    for flags, expected in (
        (["--trace=run.pdf"], "must end in .html"),
        (["--trace=/no/such/run.html"], "no such folder"),
        (["--show_tree", "--json"], "leave out --json"),
    ):
        refuses(expected, "generate.py", "--prompt=a", *flags)
