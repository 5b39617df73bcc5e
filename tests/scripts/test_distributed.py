"""Processes that share a model: one decides and prints, all compute the same."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.support import SCRIPTS
from treespec_jax import distributed
from treespec_jax.distributed import Cluster
from treespec_jax.errors import UserError

ROOT = Path(__file__).parents[2]

# All that an engine does to its devices: decoding in batches, one text sampled and
# penalised, beams, and a new beginning.
PROGRAM = """
import json, os, sys
from treespec_jax import LLM, SamplingParams, distributed

address, index, target, draft, ends = sys.argv[1:]
shared = address != "alone"
if shared:
    distributed.initialize(address, 2, int(index), timeout=120)
if distributed.is_follower() and ends:
    os._exit(3)
pair = dict(model=draft, tree="regular:2x1", tau=0.7)
sizes = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=2, prefill_chunks=(16,)
)
options = dict(sizes, mesh="tensor:2" if shared else None)
llm = LLM(target, speculative=pair, **options)
if distributed.is_follower():
    try:
        llm.generate([[3]])
    except Exception as error:
        print(error, file=sys.stderr)
    distributed.follow()
    sys.exit()
prompts = [[3 + i for i in range(n)] for n in (20, 5, 9)]
params = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.9, seed=3, repetition_penalty=1.2),
    SamplingParams(max_tokens=12, logprobs=2, temperature=0.5, seed=1),
]
found = {"texts": [c.token_ids for c in llm.generate(prompts, params)]}
found["beams"] = llm.beam_search(prompts[0], beams=2, max_tokens=6)[0][0].token_ids
llm.reset()
found["again"] = [c.token_ids for c in llm.generate(prompts[:1], params[0])]
try:
    shown = lambda _, logits: logits
    llm.generate(prompts[0], SamplingParams(logits_processors=(shown,)))
except Exception as error:
    found["function"] = str(error)
print(json.dumps(found), flush=True)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    env["JAX_NUM_CPU_DEVICES"] = str(devices)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], env=env, **pipes)


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none stays behind."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        texts = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


def of_both(name: str, *flags: str, more: tuple[str, ...] = ()) -> list:
    """A command in processes 0 and 1, of two devices each; the latter gets `more`."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    given = [str(SCRIPTS / name), "--distributed", address, "--num_processes=2", *flags]
    ids = [["--process_id=0"], ["--process_id=1", *more]]
    return finish(*(start(*given, *one, devices=2) for one in ids))


@pytest.mark.slow
def test_two_processes_give_the_texts_of_one(files):
    address, paths = f"127.0.0.1:{free_port()}", (files.target, files.draft, "")
    runs = [start("-c", PROGRAM, address, i, *paths) for i in "01"]
    alone = start("-c", PROGRAM, "alone", "0", *paths)
    (code, out, err), follower, single = finish(*runs, alone)
    assert (code, follower[0], single[0]) == (0, 0, 0), err + follower[2] + single[2]
    found, want = (json.loads(text.splitlines()[-1]) for text in (out, single[1]))
    assert "functions must be those of a module" in found.pop("function")
    want.pop("function", None)
    assert found == want and len(set(map(str, found["texts"]))) == 3
    assert "process 0 makes the requests" in follower[2]


@pytest.mark.slow
def test_a_process_that_is_lost_ends_the_others(files):
    address, paths = f"127.0.0.1:{free_port()}", (files.target, files.draft, "ends")
    lead, follower = finish(*(start("-c", PROGRAM, address, i, *paths) for i in "01"))
    assert follower[0] == 3
    assert lead[0] == 1 and "process 1 is gone; its stderr says why" in lead[2]


@pytest.mark.slow
def test_generate(files):
    """Process 0 prints what one process would; the other prints nothing.

    Trees are chosen by what their steps take, which no two processes measure alike.
    """
    pair = f"--target={files.target}", f"--draft={files.draft}"
    flags = *pair, "--max_tokens=24", "--max_len=64", "--prompt=a cat"
    (code, out, err), (other, silent, nothing) = of_both("generate.py", *flags)
    assert (code, other) == (0, 0), err + nothing
    alone = finish(start(str(SCRIPTS / "generate.py"), *flags))[0]
    assert alone[0] == 0 and out == alone[1] and out.startswith("a cat")
    assert "tokens per step" in err
    assert not silent and "error" not in nothing and "tokens" not in nothing


@pytest.mark.slow
def test_benchmark(files, tmp_path):
    """Process 0 measures, prints and writes; texts are those of one process."""
    questions = tmp_path / "q.jsonl"
    rows = ({"category": "a", "turns": [text]} for text in ("the cat", "a dog"))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = "--methods=draft_model", "--shapes=chain:2", "--rounds=1"
    grid = *grid, "--latency_tokens=0", "--nobreakdown"
    sizes = f"--target={files.target}", f"--draft={files.draft}", "--max_tokens=6"
    flags = *grid, *sizes, f"--suite=file:{questions}", "--max_len=64"
    out = tmp_path / "shared", tmp_path / "none", tmp_path / "alone"
    shared, none, alone = (f"--output={path}" for path in out)
    (code, text, err), (other, silent, nothing) = of_both(
        "benchmark.py", *flags, shared, more=(none,)
    )
    assert (code, other) == (0, 0), err + nothing
    assert "chain:2" in text and not silent and "answer" not in nothing
    assert (out[0] / "results.md").read_text() in text and not out[1].exists()
    single = finish(start(str(SCRIPTS / "benchmark.py"), *flags, alone))[0]
    assert single[0] == 0, single[2]

    def texts(folder):
        lines = (folder / "runs.jsonl").read_text().splitlines()
        entries = map(json.loads, lines)
        return [x["token_ids"] for x in entries if "token_ids" in x]

    assert texts(out[0]) == texts(out[2]) and len(texts(out[0])) == 4


@pytest.mark.slow
def test_mistakes_of_a_cluster(files):
    flags = f"--target={files.target}", "--tree=none", "--prompt=a", "--max_len=64"
    lead, follower = of_both("generate.py", *flags, more=("--max_len=32",))
    for code, out, err in (lead, follower):
        assert code == 2 and not out
        assert "process 1 was started with other settings than process 0" in err
    few = of_both("generate.py", *flags, "--mesh=tensor:2")
    # Of what all come upon, process 0 tells.
    assert (few[0][0], few[1][0]) == (2, 0)
    assert "leaves process 1 without a device" in few[0][2]
    alone = start(str(SCRIPTS / "generate.py"), *flags, "--distributed")
    cluster = "--distributed", "--num_processes=2", "--join_timeout=5"
    given = str(SCRIPTS / "generate.py"), *flags, *cluster
    lead, follower = (
        start(*given, f"--coordinator=127.0.0.1:{free_port()}", f"--process_id={i}")
        for i in (0, 1)
    )
    lead, follower, alone = finish(lead, follower, alone)
    assert alone[0] == 2 and "jax finds no cluster of processes here" in alone[2]
    assert follower[0] == 2 and "no process 0 answers at 127.0.0.1" in follower[2]
    assert lead[0] == 2 and "not all 2 processes came within 5 s" in lead[2]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(coordinator="a:1"), "give --num_processes and --process_id too"),
        (dict(num_processes=2), "give --coordinator and --process_id too"),
        (dict(coordinator="a", num_processes=2, process_id=0), "give HOST:PORT"),
        (dict(coordinator="a:b", num_processes=2, process_id=0), "give HOST:PORT"),
        (dict(coordinator="a:1", num_processes=0, process_id=0), "give 1 or more"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "from 0 to 1"),
        (dict(timeout=0), "--join_timeout=0: give 1 second or more"),
    ],
)
def test_clusters_that_cannot_be(fields, says):
    with pytest.raises(UserError, match=says):
        Cluster(**fields)


def test_flags(refuses, files):
    base = "generate.py", f"--target={files.target}", "--prompt=a"
    refuses("--num_processes needs --distributed", *base, "--num_processes=2")
    refuses("give --coordinator and", *base, "--distributed", "--process_id=1")
    for flag in ("--verify_lossless", "--trace=a.html"):
        refuses("runs in one process", *base, "--distributed", flag)


def test_alone_nothing_is_repeated():
    thing = object()
    assert distributed.repeated(thing, ("method",)) is thing
    assert not distributed.is_follower() and not distributed.is_multiprocess()
    with pytest.raises(UserError, match="follows nobody"):
        distributed.follow()
