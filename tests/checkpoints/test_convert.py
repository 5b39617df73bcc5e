"""The command line of convert_checkpoint.py."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints.support import same_parameters
from treespec_jax.checkpoints import (
    conversion,
    convert,
    describe,
    load,
    save,
    saving,
)
from treespec_jax.errors import UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"


def start(*arguments, **options):
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        **options,
    )


def one_line(done, message):
    """Asserts exit code 2 and one line on stderr that holds the message."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not done.stdout


def test_converts(tmp_path):
    done = start(
        SCRIPT,
        f"--input={GOLDEN / 'llama_tied'}",
        f"--output={tmp_path / 'out'}",
        "--dtype=bfloat16",
    )
    assert done.returncode == 0, done.stderr
    assert "parameters in bfloat16, no tokenizer" in done.stdout
    assert "writing: 100%" in done.stderr
    assert "WARNING" not in done.stderr and "note: " not in done.stderr
    assert load(tmp_path / "out").dtype.name == "bfloat16"


def test_says_what_is_left_out(tmp_path):
    folder = GOLDEN / "gemma3_multimodal"
    done = start(SCRIPT, f"--input={folder}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert f"note: {folder} also reads images; its text part alone" in done.stderr
    found = load(tmp_path / "out")
    assert found.config == load(folder).config
    assert found.notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input is missing"),
        (["--input=a", "--output=b", "--inptu=c"], "Unknown command line flag 'inptu'"),
        (["--input=a", "--output=b", "--dtype=int8"], "one of <float32|bfloat16|floa"),
        (["--input=a", "--output=b", "c"], "argument 'c' is not a flag"),
        (["--input=/nowhere", "--output=b"], "no checkpoint at /nowhere"),
        (["--input=tests", "--output=LICENSE"], "LICENSE is a file"),
        (["--input=tests", "--output=LICENSE/a"], "choose another"),
        (["--input=tests"], "--output is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    one_line(start(SCRIPT, *arguments, cwd=ROOT), message)


def test_help_is_no_mistake():
    done = start(SCRIPT, "--help")
    assert done.returncode == 0
    assert "--dtype" in done.stdout


def test_damaged_checkpoint_is_one_line(tmp_path):
    save(load(GOLDEN / "llama_tied"), tmp_path / "in")
    (tmp_path / "in" / "params" / "0000" / "_METADATA").unlink()
    done = start(SCRIPT, f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    one_line(done, "params/0000/_METADATA cannot be read (No such file or directory)")


@pytest.fixture
def source(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "llama_grouped", tmp_path / "in"))


@pytest.fixture
def small_groups(monkeypatch):
    """As with a large model: many groups. 14 here, of one parameter each."""
    monkeypatch.setattr(saving, "_GROUP", 1)


@pytest.fixture
def writes(monkeypatch):
    """Names of the groups that are written; `fail_at` of them stops as a full disk."""
    seen = []
    plain = saving.write_group

    def write(folder, name, arrays):
        if len(seen) == write.fail_at:
            raise OSError(28, "No space left on device")
        seen.append(name)
        return plain(folder, name, arrays)

    write.fail_at, write.seen = None, seen
    monkeypatch.setattr(conversion, "write_group", write)
    return write


def stop(source, output, writes, at, dtype=None, **more):
    """A conversion that meets a full disk after `at` groups."""
    writes.fail_at = at
    with pytest.raises(UserError, match="No space left on device; the same command"):
        convert(describe(source), output, dtype, **more)
    writes.fail_at = None
    writes.seen.clear()


def whole(source, output, dtype=None):
    """Asserts that `output` is what `source` converts to, with nothing beside."""
    assert same_parameters(load(output).model, load(source, dtype).model)
    assert load(output).config == load(source).config
    assert {path.name for path in output.parent.iterdir()} == {"in", output.name}
    names = {path.name for path in output.iterdir()}
    assert names == {"metadata.json", "params"}


def test_goes_on_where_it_stopped(source, tmp_path, small_groups, writes):
    output = tmp_path / "out"
    stop(source, output, writes, 6)
    # What is there is not taken for a checkpoint.
    assert not output.exists()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load(tmp_path / ".out.partial")
    done = convert(describe(source), output)
    assert writes.seen == [f"{i:04d}" for i in range(6, 15)]
    assert done.resumed > 0
    whole(source, output)


def test_an_earlier_output_stays_until_the_new_one_is_whole(
    source, tmp_path, small_groups, writes
):
    output = tmp_path / "out"
    convert(describe(source), output, "bfloat16")
    stop(source, output, writes, len(writes.seen) + 3, overwrite=True)
    assert load(output).dtype.name == "bfloat16"
    convert(describe(source), output, overwrite=True)
    whole(source, output)


def test_a_part_that_was_damaged_since_is_written_again(
    source, tmp_path, small_groups, writes
):
    stop(source, tmp_path / "out", writes, 6)
    partial = tmp_path / ".out.partial"
    (partial / "params" / "0002" / "manifest.ocdbt").write_bytes(b"x")
    # The group that was being written, and a line that was.
    (partial / "params" / "0006.orbax-checkpoint-tmp").mkdir()
    with (partial / "journal.jsonl").open("a") as file:
        file.write('{"group": "0006", "fi')
    convert(describe(source), tmp_path / "out")
    assert writes.seen == ["0002", *(f"{i:04d}" for i in range(6, 15))]
    whole(source, tmp_path / "out")


def change_time(source):
    os.utime(source / "model.safetensors", ns=(1, 1))
    return {}


def change_values(source):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = 2
    save_file(tensors, source / "model.safetensors")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_time,
        change_values,
        lambda _: {"dtype": "bfloat16"},
        lambda _: {"restart": True},
    ],
)
def test_another_conversion_starts_over(source, tmp_path, small_groups, writes, change):
    stop(source, tmp_path / "out", writes, 6)
    how = change(source)
    done = convert(describe(source), tmp_path / "out", **how)
    assert len(writes.seen) == 15 and done.resumed == 0
    whole(source, tmp_path / "out", how.get("dtype"))


def test_a_damaged_source_leaves_nothing(source, tmp_path, small_groups):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight holds NaN or infinity"):
        convert(describe(source), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_two_at_once(source, tmp_path):
    with (
        conversion._locked(tmp_path / ".out.partial"),
        pytest.raises(UserError, match="written by another conversion; wait"),
    ):
        convert(describe(source), tmp_path / "out")
    convert(describe(source), tmp_path / "out")
    whole(source, tmp_path / "out")


KILLED = """
import os, signal, sys
from treespec_jax.checkpoints import conversion, describe, saving

saving._GROUP = 1
plain = saving.write_group

def write(folder, name, arrays):
    files = plain(folder, name, arrays)
    if name == "0004":
        os.kill(os.getpid(), signal.SIGKILL)
    return files

conversion.write_group = write
conversion.convert(describe(sys.argv[1]), sys.argv[2])
"""


def test_a_kill(source, tmp_path, small_groups, writes):
    """Between a group's files and its line in the journal."""
    done = start("-c", KILLED, source, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    convert(describe(source), tmp_path / "out")
    assert writes.seen == [f"{i:04d}" for i in range(4, 15)]
    whole(source, tmp_path / "out")


@pytest.mark.parametrize("room", [20, 96])  # in 512 bytes
def test_a_disk_that_is_full(source, tmp_path, room):
    """The system refuses to write; then there is room, and it goes on."""
    flags = SCRIPT, f"--input={source}", f"--output={tmp_path / 'out'}"
    done = subprocess.run(
        ["sh", "-c", f'ulimit -f {room}; exec "$@"', "sh", sys.executable, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    *bars, last = done.stderr.splitlines()
    assert all(not bar or bar.startswith("writing: ") for bar in bars), done.stderr
    assert last.startswith("error: cannot write") and "File too large" in last
    assert "the same command goes on from here" in last
    assert not (tmp_path / "out").exists()
    assert start(*flags).returncode == 0
    whole(source, tmp_path / "out")
