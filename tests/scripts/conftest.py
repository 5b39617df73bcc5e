"""Tiny checkpoints on disk, and scripts run in this process."""

from __future__ import annotations

import dataclasses
import runpy
import struct
import sys
import types
from pathlib import Path

import jax
import pytest
from absl import flags
from flax import nnx

from tests.conftest import TINY
from tests.scripts.fake_llm import FakeLLM
from tests.scripts.support import SCRIPTS
from treespec_jax import cli, commands
from treespec_jax.checkpoints import LoadedModel, load_tokenizer, save
from treespec_jax.commands import loading
from treespec_jax.engine import background
from treespec_jax.measurement import machine, plots, step_cost
from treespec_jax.models.transformer import Transformer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def write_tokenizer(path: Path, letters: str = LETTERS) -> Path:
    """A llama2.c tokenizer of bytes and letters; no merges."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    pieces += [f"<0x{byte:02X}>".encode() for byte in range(256)]
    pieces += [letter.encode() for letter in letters]
    records = [struct.pack("<fi", 0.0, len(p)) + p for p in pieces]
    path.write_bytes(struct.pack("<i", 6) + b"".join(records))
    return path


@dataclasses.dataclass(frozen=True)
class Files:
    """Paths: a pair, a drafter of other letters, a target without a tokenizer."""

    target: str
    draft: str
    foreign: str
    bare: str
    tokenizer: str


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = load_tokenizer(write_tokenizer(folder / "tok.bin"))
    other = load_tokenizer(write_tokenizer(folder / "other.bin", LETTERS[::-1]))
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, num_layers=1)
    target = Transformer(config, rngs=nnx.Rngs(0))
    # Near enough to the target to be right now and then.
    draft = Transformer(config, rngs=nnx.Rngs(0))
    draft.head[...] = draft.head[...] + 0.05 * jax.random.normal(
        jax.random.key(1), draft.head[...].shape
    )

    def write(name, model, tokenizer):
        loaded = LoadedModel(
            model.config, model, tokenizer, name, model.embedding[...].dtype
        )
        save(loaded, folder / name)
        return str(folder / name)

    return Files(
        target=write("target", target, tokenizer),
        draft=write("draft", draft, tokenizer),
        foreign=write("foreign", draft, other),
        bare=write("bare", target, None),
        tokenizer=str(folder / "tok.bin"),
    )


@pytest.fixture(scope="session")
def chat_pair(tmp_path_factory):
    """Converted folders of one model; the drafter's embedding lacks some rows."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "llama2")
    for name, rows in (("target", 384), ("draft", tokenizer.vocab_size)):
        config = dataclasses.replace(TINY, vocab_size=rows, num_layers=1)
        model = Transformer(config, rngs=nnx.Rngs(0))
        dtype = model.embedding[...].dtype
        save(LoadedModel(config, model, tokenizer, name, dtype), folder / name)
    return folder


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """One for all runs, so that each program is compiled once."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield tmp_path_factory.mktemp("compiled")
    for name, value in before.items():
        jax.config.update(name, value)


@dataclasses.dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_script(capsys, monkeypatch, compilation_cache):
    """Runs a script, or a subcommand of `treespec`, in this process."""

    def run(name: str, *args: str) -> Result:
        known = set(flags.FLAGS)
        argv = [name, *args]
        source = Path(commands.__file__).with_name(f"{Path(name).stem}.py")
        if source.exists() and "compilation_cache" in source.read_text():
            argv.insert(1, f"--compilation_cache={compilation_cache}")
        monkeypatch.setattr(sys, "argv", argv)
        # Else a command would end this process while a program is being compiled.
        monkeypatch.setattr(background, "compiling", lambda: False)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as caught:
                if name.endswith(".py"):
                    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
                cli.main(["treespec", *argv])
        finally:
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        printed = capsys.readouterr()
        return Result(caught.value.code or 0, printed.out, printed.err)

    return run


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


@pytest.fixture
def refuses(run_script):
    """Asserts one clear line and exit code 2."""

    def check(expected: str, name: str, *args: str) -> None:
        result = run_script(name, *args)
        assert result.code == 2, result
        assert result.out == ""
        assert len(result.err.splitlines()) == 1, result.err
        assert expected in result.err
        assert "Traceback" not in result.err

    return check


@pytest.fixture
def pair(files, monkeypatch):
    """Flags of the tiny pair; little memory is read, and few lengths are timed."""
    monkeypatch.setattr(machine, "BYTES", 4 << 20)
    monkeypatch.setattr(step_cost, "CURVE_NODES", (1, 2))
    return [f"--target={files.target}", f"--draft={files.draft}"]


@pytest.fixture
def fake(monkeypatch):
    """`FakeLLM` in the place of models and of `LLM`."""
    monkeypatch.setattr(FakeLLM, "asked", [])
    monkeypatch.setattr(FakeLLM, "stop_after", 10**9)
    monkeypatch.setattr(plots, "save_suite", lambda results, path: None)
    target = types.SimpleNamespace(model=None)
    pair = types.SimpleNamespace(make=FakeLLM, target=target)
    monkeypatch.setattr(loading, "load_pair", lambda settings: pair)
    return FakeLLM


@pytest.fixture
def bench(run_script, pair, tmp_path):
    """Runs the benchmark on three prompts, into the folder `results`."""
    (tmp_path / "p.txt").write_text("the cat\na dog\na red hat\n")

    def run(*more):
        return run_script(
            "benchmark.py",
            *pair,
            f"--suite=file:{tmp_path / 'p.txt'}",
            "--shapes=chain:1",
            "--max_tokens=8",
            "--nobreakdown",
            f"--output={tmp_path / 'results'}",
            *more,
        )

    return run
