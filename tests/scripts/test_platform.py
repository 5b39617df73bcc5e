"""Which platform the scripts start on where libtpu is installed and no TPU is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pallas_kernels import machine
from tests.scripts.support import SCRIPTS
from treespec_jax import cli


@pytest.fixture
def installed(monkeypatch):
    """Pretends: which packages and devices there are. Returns what would be chosen."""

    def choose(libtpu=True, tpu=False, nvidia=False, plugins=(), given=None):
        monkeypatch.setattr(
            cli.importlib.util, "find_spec", lambda name: libtpu or None
        )
        monkeypatch.setattr(machine, "has_tpu", lambda: tpu)
        monkeypatch.setattr(machine, "has_nvidia", lambda: nvidia)
        found = [SimpleNamespace(name=name) for name in plugins]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
        if given is None:
            monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        else:
            monkeypatch.setenv("JAX_PLATFORMS", given)
        cli.skip_absent_tpu()
        return os.environ.get("JAX_PLATFORMS")

    before = os.environ.get("JAX_PLATFORMS")
    yield choose
    monkeypatch.undo()
    assert os.environ.get("JAX_PLATFORMS") == before


def test_platform(installed):
    assert installed() == "cpu"
    assert installed(nvidia=True, plugins=["xla_cuda13"]) == "cuda,cpu"
    assert installed(nvidia=False, plugins=["xla_cuda13"]) == "cpu"
    assert installed(nvidia=True) == "cpu"  # no plugin: jax could not use it


def test_platform_is_left_to_jax_and_the_user(installed):
    assert installed(libtpu=False) is None
    assert installed(tpu=True) is None
    assert installed(plugins=["rocm"]) is None
    assert installed(given="tpu") == "tpu"


def test_tpus_are_found_by_their_files(tmp_path):
    assert not machine.has_tpu(str(tmp_path))
    device = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n")
    (device / "class").write_text("0x020000\n")  # the network card of Google's cloud
    assert not machine.has_tpu(str(tmp_path))
    (device / "class").write_text("0xff0000\n")
    assert machine.has_tpu(str(tmp_path))
    (device / "vendor").write_text("0x10de\n")
    assert not machine.has_tpu(str(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert machine.has_nvidia(str(tmp_path)) and not machine.has_tpu(str(tmp_path))
    (tmp_path / "dev/accel0").touch()
    assert machine.has_tpu(str(tmp_path))


@pytest.mark.skipif(machine.has_tpu() or machine.has_nvidia(), reason="has a device")
def test_generate_starts_on_the_cpu_without_a_word(files, compilation_cache):
    """As a user starts it: with libtpu beside jax and nothing in the environment."""
    environment = {k: v for k, v in os.environ.items() if "TPU" not in k}
    del environment["JAX_PLATFORMS"]
    result = subprocess.run(
        [
            sys.executable,
            SCRIPTS / "generate.py",
            f"--target={files.target}",
            "--tree=none",
            "--prompt=a",
            "--max_tokens=2",
            "--max_len=64",
            "--json",
            "--quiet",
            f"--compilation_cache={compilation_cache}",
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["versions"]["backend"] == "cpu"


def test_libtpu_is_left_alone_before_a_command_is_imported(monkeypatch, run_script):
    """Some commands import jax, which reads its variables then."""
    seen = []
    monkeypatch.setattr(cli, "skip_absent_tpu", lambda: seen.append("chosen"))
    find = cli.importlib.import_module

    def imported(name):
        seen.append(name)
        return find(name)

    monkeypatch.setattr(cli.importlib, "import_module", imported)
    assert run_script("list_models.py", "--help").code == 0
    assert seen[:2] == ["chosen", "treespec_jax.commands.list_models"]


@pytest.mark.skipif(machine.has_tpu() or machine.has_nvidia(), reason="has a device")
@pytest.mark.parametrize("named", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(files, named):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--max_tokens=1"]
    result = subprocess.run(
        [sys.executable, SCRIPTS / "generate.py", *args, "--compilation_cache="],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": named},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: JAX_PLATFORMS={named} names no device")
    assert result.stderr.count("\n") == 1
