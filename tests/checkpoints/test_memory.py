"""Memory while a checkpoint is read: the model, and little more.

Each case runs in a process of its own, whose peak resident memory counts everything:
buffers, pages of mapped files, and what libraries hold.
"""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import pytest

from tests.checkpoints import gguf_files
from tests.checkpoints.support import write_huggingface
from treespec_jax.checkpoints.families import name_table
from treespec_jax.checkpoints.formats import gguf
from treespec_jax.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux counts pages"
    ),
]

SMALL = ModelConfig(
    vocab_size=64,
    embed_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_positions=64,
)

# 100 M parameters, a quarter of them in the embedding alone, as in small real models.
CONFIG = ModelConfig(
    vocab_size=32000,
    embed_dim=768,
    mlp_dim=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    max_positions=2048,
    tied_embeddings=True,
)

MEASURE = """
import json, pathlib, sys
import jax
from flax import nnx
from treespec_jax.checkpoints import load
from treespec_jax.sharding import make_mesh

small, path, dtype, devices = sys.argv[1:]
if devices != "1":
    jax.config.update("jax_num_cpu_devices", int(devices))
mesh = make_mesh(f"tensor:{devices}") if devices != "1" else None


def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(name))


kind = {"dtype": "float32", "weights": dtype, "mesh": mesh}
load(small, **kind)  # imports and starts all there is
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loaded = load(path, **kind)
peak = status("VmHWM") - before
final = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(loaded.model)))
print(json.dumps([peak, final]))
"""


def write(folder, config, dtype):
    tensors = {
        piece.name: np.full(piece.shape, 0.5, dtype)
        for piece in name_table(config, ()).pieces
    }
    return write_huggingface(folder, config, tensors)


def write_gguf(path, config, kind):
    """Matrices of one type, all zero; a block of 256 takes 144 bytes in Q4_K."""
    raw = {}
    for piece in gguf.name_table(config):
        *rows, size = piece.shape
        raw[piece.name] = "F32", np.ones(piece.shape, np.float32)
        if rows and kind == "Q4_K":
            raw[piece.name] = kind, np.zeros((*rows, size // 256 * 144), np.uint8)
    return gguf_files.write(path, gguf_files.metadata_of(config), raw)


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONVERT = """
import sys
from treespec_jax.checkpoints import load, save
for path in sys.argv[1:]:
    save(load(path), path + "_native")
print("null")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    small = write(root / "small", SMALL, "float32")
    made = {"small": small}
    for name in ["float32", "bfloat16"]:
        made[name] = write(root / name, CONFIG, name)
    run(CONVERT, *made.values())
    for name, path in list(made.items()):
        made[f"{name} native"] = f"{path}_native"
    made["small gguf"] = write_gguf(root / "small.gguf", SMALL, "F32")
    made["Q4_K gguf"] = write_gguf(root / "large.gguf", CONFIG, "Q4_K")
    return made


@pytest.mark.parametrize(
    ("stored", "dtype", "devices"),
    [
        ("float32", "float32", 1),
        ("bfloat16", "float32", 1),
        ("float32", "bfloat16", 1),
        ("float32", "float32", 2),
        ("float32", "int8", 1),
        ("float32", "int8:128", 1),
        ("float32 native", "float32", 1),
        ("bfloat16 native", "float32", 1),
        ("float32 native", "bfloat16", 1),
        ("float32 native", "float32", 2),
        ("Q4_K gguf", "float32", 1),
    ],
)
def test_peak_is_the_model_and_little_more(folders, stored, dtype, devices, capsys):
    _, *kind = stored.split()
    small = folders[" ".join(["small", *kind])]
    peak, final = run(MEASURE, small, folders[stored], dtype, devices)
    with capsys.disabled():
        print(
            f"\n{stored} -> {dtype} on {devices}: peak {peak / 1e6:.0f} MB, "
            f"{peak / final:.3f} of the model's {final / 1e6:.0f} MB"
        )
    assert final / 1.01 < peak <= 1.15 * final
