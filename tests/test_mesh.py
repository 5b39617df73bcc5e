"""Devices that share a model: the same attention, the same texts.

The devices are fake ones, which only a process of its own can have; it does everything
once and the tests look at what it found.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
# Implementation, mesh, the axis that cuts heads, and a device's part of them.
CALLS = [
    ("reference", "tensor:4", "tensor", 1 / 4),
    ("reference", "data:2,tensor:2", "tensor", 1 / 2),
    ("reference", "tensor:2", None, 1),
    ("tpu", "tensor:2", "tensor", 1 / 2),
]

PROGRAM = """
import dataclasses, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pallas_kernels.tree_attention import AttentionSpec, BlockSizes
from pallas_kernels.tree_attention import quantize_rows, tree_attention
from tests.conftest import TINY
from tests.kernels.oracle import cast, make_case
from treespec_jax import sharding
from treespec_jax import LLM, SamplingParams
from treespec_jax.checkpoints import LoadedModel, drafters, load, save
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.transformer import Transformer

found = {"attention": [], "texts": {}, "errors": {}}

rng = np.random.default_rng(0)
case = make_case(rng, B=2, T=4, G=2, K=4, H=128, page=16, lengths=(37, 5), max_pages=3)
case = jax.tree.map(jnp.asarray, cast(case))
int8, scales = quantize_rows(case.kv_pages)
scales = jnp.pad(scales, ((0, 0),) * 3 + ((0, 112),))
case = dataclasses.replace(case, kv_pages=int8, kv_scales=scales)
for kernel, name, axis, _ in json.loads(sys.argv[1]):
    spec = AttentionSpec(scale=0.1, window=9, implementation=kernel)
    if kernel == "tpu":
        sizes = BlockSizes(block_rows=32, rows=16)
        spec = dataclasses.replace(spec, interpret=True, block_sizes=sizes)
    want = tree_attention(case, spec)
    mesh = sharding.make_mesh(name)
    got = tree_attention(case, dataclasses.replace(spec, mesh=mesh, heads_axis=axis))
    part = got.sharding.shard_shape(got.shape)[2] / got.shape[2]
    found["attention"].append((float(jnp.abs(got - want).max()), part))
try:
    odd = dict(
        queries=case.queries[:, :, :6],
        kv_pages=int8[:, :3],
        kv_scales=scales[:, :3],
        tree_kv=case.tree_kv[:, :3],
    )
    mesh = sharding.make_mesh("tensor:4")
    spec = AttentionSpec(scale=0.1, mesh=mesh, heads_axis="tensor")
    tree_attention(dataclasses.replace(case, **odd), spec)
except ValueError as error:
    found["errors"]["heads"] = str(error)

sizes = dict(vocab_size=96, num_layers=1, num_heads=8, num_kv_heads=4)
wide = dataclasses.replace(TINY, **sizes)
target = Transformer(wide, rngs=nnx.Rngs(0))
target.norm.scale[...] = target.norm.scale[...] * 3.0
draft = Transformer(dataclasses.replace(wide, num_kv_heads=2), rngs=nnx.Rngs(1))
draft.embedding[...], draft.head[...] = target.embedding[...], target.head[...]


# Four devices cut the target's heads; the drafter's two stay whole.
folders = {}
for name, model in (("target", target), ("draft", draft)):
    folders[name] = f"{sys.argv[2]}/{name}"
    loaded = LoadedModel(model.config, model, None, name, np.dtype("float32"))
    save(loaded, folders[name])
pair = dict(speculative=dict(model=folders["draft"], tree="regular:2x1", tau=0.7))
sizes = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)
prompts = [list(range(3, 3 + n)) for n in (20, 5, 9)]
params = [SamplingParams(max_tokens=24, **x) for x in ({}, {"seed": 3}, {})]
params[1] = dataclasses.replace(params[1], temperature=0.9)


def run(**options):
    llm = LLM(folders["target"], **({"speculative": None} | options), **sizes)
    executor = llm.engine._executor
    texts = [c.token_ids for c in llm.generate(prompts, params)]
    held = [
        leaf.sharding.shard_shape(leaf.shape)[1] / leaf.shape[1]
        for leaf in (
            executor._state.pages[0],
            *getattr(executor._state.draft, "pages", ()),
        )
    ]
    programs = *executor._programs.values(), executor._prefill
    # A program that nothing asked for is none.
    compiled = [program._cache_size() for program in programs]
    return texts, held, [count for count in compiled if count]


found["texts"]["alone"] = run()
found["texts"]["shared"] = run(mesh="tensor:4", **pair)
layer = dataclasses.replace(wide, vocab_size=48)
eagle = EagleModel(
    EagleConfig(3, layer, 96, wide.embed_dim, feature_layers=(0, 1)), rngs=nnx.Rngs(2)
)
eagle.token_ids[...] = 2 * eagle.token_ids[...]
drafters.save(
    eagle, f"{sys.argv[2]}/eagle", target=folders["target"], dtype="float32"
)
rows = dict(model=f"{sys.argv[2]}/eagle", tree="regular:2x1", check_drafter=False)
found["texts"]["eagle"] = run(mesh="tensor:4", speculative=rows)
loaded = load(folders["target"], mesh=sharding.make_mesh("tensor:4"))
for name, options in {"pair": pair, "twice": {"mesh": "tensor:4"}}.items():
    try:
        LLM(loaded, **({"speculative": None} | options), **sizes)
    except UserError as error:
        found["errors"][name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(CALLS), str(folder)]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "index", range(len(CALLS)), ids=lambda i: " ".join(CALLS[i][:2])
)
def test_each_device_does_its_own_heads(found, index):
    """The numbers are the same, from int8 pages and within a window."""
    error, part = found["attention"][index]
    assert error < 1e-6 and part == CALLS[index][3]


def test_a_mesh_changes_no_text(found):
    """Greedy and sampled, as plain decoding on one device has it.

    The cache is cut where heads divide, and stays so from call to call.
    """
    texts, held, programs = found["texts"]["shared"]
    assert all(len(text) == 24 for text in texts)
    assert texts == found["texts"]["alone"][0]
    assert held == [1 / 4, 1] and found["texts"]["alone"][1] == [1]
    assert programs == found["texts"]["alone"][2] == [1, 1], "compiled again"


def test_a_layer_over_the_targets_rows_lies_on_its_mesh(found):
    texts, held, programs = found["texts"]["eagle"]
    assert texts == found["texts"]["alone"][0]
    assert (held, programs) == ([1 / 4, 1 / 4], [1, 1])


def test_what_does_not_fit(found):
    assert "3 key/value heads cannot be cut in 4" in found["errors"]["heads"]
    assert found["errors"]["pair"] == (
        "the target lies on mesh tensor:4, the drafter on cpu:0; load both with "
        "the same mesh"
    )
    assert "pass the mesh to checkpoints.load" in found["errors"]["twice"]
