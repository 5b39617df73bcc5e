"""From tensors to parameters, by parts: what is read, and where it lies."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.support import SMALL
from treespec_jax.checkpoints import placement
from treespec_jax.checkpoints.formats import Description, llama2c
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.placement import Parameters
from treespec_jax.errors import UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


class ArraySource:
    """Tensors from memory; remembers the shape of every part that was read."""

    path, dtype = pathlib.Path("memory"), "float32"

    def __init__(self, arrays):
        self.arrays = arrays
        self.parts = []

    def shapes(self):
        return {name: array.shape for name, array in self.arrays.items()}

    def dtypes(self):
        return {name: array.dtype.name for name, array in self.arrays.items()}

    def read(self, name, region):
        part = self.arrays[name][region].copy()
        assert len(region) == part.ndim and part.size
        self.parts.append((name, part.shape))
        return part

    def files(self):
        return []


@pytest.fixture(scope="module")
def source():
    """Every tensor of llama2.c's table, which has pairs to reorder."""
    rng = np.random.default_rng(0)
    return ArraySource(
        {
            piece.name: rng.normal(size=piece.shape).astype(np.float32)
            for piece in llama2c.name_table(SMALL)
        }
    )


@pytest.fixture(scope="module")
def parameters(source):
    return parameters_of(source)


def parameters_of(source, dtype="float32"):
    tensors = Tensors(source, llama2c.name_table(SMALL))
    kind = types.SimpleNamespace(open=lambda _: tensors)
    return Parameters(Description(SMALL, None, source.path, kind), dtype)


@pytest.fixture(scope="module")
def whole(parameters):
    return {item.path: parameters.read(item.path) for item in parameters.items}


def test_against_numpy(source, whole):
    """The fused parameters, put together by hand."""
    D, K, G, H = 16, 2, 2, 4
    heads = source.arrays["wq.1"].reshape(K, G, H // 2, 2, D).swapaxes(2, 3)
    keys = source.arrays["wk.1"].reshape(K, H // 2, 2, D).swapaxes(1, 2)
    qkv = whole["layers.1.attention.qkv"]
    np.testing.assert_array_equal(qkv[:, :G], heads.reshape(K, G, H, D))
    np.testing.assert_array_equal(qkv[:, G], keys.reshape(K, H, D))
    np.testing.assert_array_equal(qkv[:, G + 1], source.arrays["wv.1"].reshape(K, H, D))
    out = source.arrays["wo.0"].reshape(D, K * G, H)
    np.testing.assert_array_equal(whole["layers.0.attention.out"], out)
    both = np.stack([source.arrays["w1.0"], source.arrays["w3.0"]])
    np.testing.assert_array_equal(whole["layers.0.mlp.gate_up"], both)


@pytest.mark.parametrize("size", [1, 200, 1 << 20])
def test_any_size_of_block_gives_the_same(parameters, whole, size, monkeypatch):
    monkeypatch.setattr(placement, "_PART", size)
    for path, array in whole.items():
        np.testing.assert_array_equal(parameters.read(path), array)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_part_of_any_parameter(parameters, whole, data):
    """A part read alone is that part of the whole, heads cut in two included."""
    path = data.draw(st.sampled_from(sorted(whole)))
    box = []
    for size in whole[path].shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    inside = tuple(slice(*span) for span in box)
    np.testing.assert_array_equal(
        parameters.read(path, tuple(box)), whole[path][inside]
    )


@pytest.mark.parametrize(
    ("path", "box", "parts"),
    [
        ("embedding", ((75, 150), (0, 16)), [("embedding", (75, 16))]),
        # One of two heads of keys: half of the rows of each of three tensors.
        (
            "layers.0.attention.qkv",
            ((1, 2), (0, 4), (0, 4), (0, 16)),
            [("wq.0", (8, 16)), ("wk.0", (4, 16)), ("wv.0", (4, 16))],
        ),
        (
            "layers.0.attention.out",
            ((0, 16), (3, 4), (0, 4)),
            [("wo.0", (16, 4))],
        ),
        (
            "layers.0.mlp.gate_up",
            ((0, 2), (6, 12), (0, 16)),
            [("w1.0", (6, 16)), ("w3.0", (6, 16))],
        ),
        ("layers.0.mlp.gate_up", ((1, 2), (0, 24), (0, 16)), [("w3.0", (24, 16))]),
        ("layers.0.mlp.down", ((0, 16), (6, 12)), [("w2.0", (16, 6))]),
    ],
)
def test_a_part_is_read_without_the_rest(parameters, source, path, box, parts):
    """What a device of a tensor-parallel mesh holds is all that is read for it."""
    source.parts.clear()
    parameters.read(path, box)
    assert source.parts == parts


def test_values_that_a_part_does_not_hold_are_not_looked_at(source):
    broken = ArraySource({n: a.copy() for n, a in source.arrays.items()})
    broken.arrays["w2.0"][3, 20] = np.nan
    parameters = parameters_of(broken)
    parameters.read("layers.0.mlp.down", ((0, 16), (0, 12)))
    with pytest.raises(UserError, match="memory: tensor w2.0 holds NaN or infinity"):
        parameters.read("layers.0.mlp.down", ((0, 16), (12, 24)))


def test_values_beyond_float16(source):
    large = ArraySource({n: a.copy() for n, a in source.arrays.items()})
    large.arrays["w2.0"][3, 20] = 70000
    parameters = parameters_of(large, "float16")
    with pytest.raises(UserError, match="w2.0 holds values above float16's 65504"):
        parameters.read("layers.0.mlp.down")


# Loads the golden folder on four devices every way there is; prints what it found.
ON_FOUR_DEVICES = """
import json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from flax import nnx
from tests.checkpoints.support import forward, same_parameters
from treespec_jax.checkpoints import load, save
from treespec_jax.sharding import make_mesh

source, out = map(pathlib.Path, sys.argv[1:])
tokens = np.random.default_rng(0).integers(0, 96, (2, 12))
plain = load(source)
want = np.asarray(forward(plain.model, tokens)[0])
found = {"scale": float(np.abs(want).max())}
save(plain, out / "plain")
for name, count in [("tensor:2", 2), ("tensor:4", 4)]:
    mesh = make_mesh(name)
    loaded = load(source, mesh=mesh)
    got = np.asarray(forward(loaded.model, tokens)[0])
    save(loaded, out / f"cut{count}")
    leaves = {
        ".".join(map(str, path)): leaf[...]
        for path, leaf in nnx.to_flat_state(nnx.state(loaded.model))
    }
    found[name] = {
        "error": float(np.abs(got - want).max()),
        "devices": all(len(x.sharding.device_set) == count for x in leaves.values()),
        "held": {
            path: x.addressable_shards[-1].data.size / x.size
            for path, x in leaves.items()
        },
        "native, from plain": same_parameters(
            load(out / "plain", mesh=mesh).model, plain.model
        ),
        "native, to plain": same_parameters(
            load(out / f"cut{count}").model, plain.model
        ),
        "native, to half": same_parameters(
            load(out / f"cut{count}", "bfloat16", mesh=mesh).model,
            load(source, "bfloat16").model,
        ),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ON_FOUR_DEVICES,
            ROOT / "tests" / "golden" / "llama_grouped",
            tmp_path_factory.mktemp("meshes"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["tensor:2", "tensor:4"])
def test_sharded_parameters_give_the_same_logits(on_four_devices, mesh):
    found = on_four_devices[mesh]
    assert found["devices"]
    assert found["error"] < 1e-5 * max(1, on_four_devices["scale"])


@pytest.mark.parametrize(("mesh", "part"), [("tensor:2", 1 / 2), ("tensor:4", 1 / 4)])
def test_a_device_holds_its_part(on_four_devices, mesh, part):
    """Two heads of keys do not divide by four: their parameter is held whole."""
    held = on_four_devices[mesh]["held"]
    norms = {path for path in held if path.endswith("scale")}
    qkv = {path for path in held if path.endswith("qkv")}
    assert {held[path] for path in norms} == {1}
    assert {held[path] for path in qkv} == {part if mesh == "tensor:2" else 1}
    assert {held[path] for path in held if path not in norms | qkv} == {part}


@pytest.mark.parametrize("mesh", ["tensor:2", "tensor:4"])
def test_native_folders_between_shardings(on_four_devices, mesh):
    found = on_four_devices[mesh]
    assert found["native, from plain"]
    assert found["native, to plain"]
    assert found["native, to half"]
