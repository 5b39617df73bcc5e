"""The whole step (draft, verify, accept, commit) by the compilers of other machines."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.tree_attention import api
from pallas_kernels.tree_attention.sizes import LANES
from tests.conftest import TINY
from treespec_jax.errors import UserError
from treespec_jax.measurement import compilation
from treespec_jax.models import presets
from treespec_jax.models.transformer import parameter_count

JOB = compilation.Job(tree="chain:3")


@pytest.mark.slow
def test_step_of_a_1b_model_on_four_v5e(tpu_compiler):
    """Llama 3.2 1B and a small drafter, shared by all devices of v5e:2x2.

    Four of its layers, whose caches are about as large as those of all with a quarter
    of the context; `tpu_report` compiles all of them. Each device runs the kernel on
    its own heads, in every pass over a layer, and writes its own part of the caches
    where it lies.
    """
    job = dataclasses.replace(JOB, devices=4, layers=4, context=4 * JOB.context)
    result = compilation.compile_step(job)
    report, text = result.report, result.text
    assert report.num_devices == 4
    models = job.target, job.drafter
    size = sum(parameter_count(c) * 2 for c in models)
    assert 1.0e9 < size < 1.3e9
    # A key and a value of 64 share a row of 128, as the kernel wants it.
    pool = job.batch * job.context // job.page_size + 1
    rows = pool * job.page_size * LANES * 2
    caches = rows * sum(m.num_layers * m.num_kv_heads for m in models)
    assert size + caches < 4 * report.argument_bytes < 1.05 * (size + caches)
    assert report.aliased_bytes >= caches // 4
    calls = job.target.num_layers + 3 * job.drafter.num_layers
    assert report.instances == {"tree_attention": calls} and calls == 16
    made = set(
        re.findall(rf"= \(?bf16\[{pool},\d+,1,{job.page_size}.*? ([\w-]+)\(", text)
    )
    assert "dynamic-update-slice" in made and "parameter" in made, "a dead test"
    moves = "copy", "slice", "transpose", "all-gather", "all-to-all", "collective"
    # Starts of copies too: nothing but the kernel reads the pools.
    assert not [what for what in made if what.startswith(moves)]
    assert not re.findall(rf"bf16\[{pool},.* \S+-start\(", text)
    # No cache is held twice, and no weight travels.
    assert report.temporary_bytes < caches // 2
    moved = re.findall(r"= bf16\[([\d,]+)\]\S* (?:all-gather|all-to-all)\(", text)
    assert all(math.prod(map(int, x.split(","))) < 1 << 20 for x in moved)
    assert report.flops > job.batch * 4 * 2 * (size // 2) / 4
    assert report.least_bytes > size // 4
    # Where rows of 64 lay in 128, the kernels moved twice as much.
    heads = [m.num_layers * m.num_kv_heads for m in models]
    prefix = job.batch * job.context * 2 * 64 * 2 * (heads[0] + 3 * heads[1]) // 4
    assert 1 < report.traffic.kernels / prefix < 1.05
    # All are greedy, of which the program has no doubt.
    assert " conditional(" not in text
    # Of so few layers logits are more of it than of all; docs/tpu.md has those.
    assert 1 < report.traffic.total / report.least_bytes < 1.5


def tiny_job(monkeypatch, target=None, **changes) -> compilation.Job:
    target = target or dataclasses.replace(TINY, vocab_size=256)
    drafter = dataclasses.replace(target, num_layers=1)
    monkeypatch.setattr(presets, "get", lambda name: target)
    monkeypatch.setattr(compilation, "small_drafter", lambda config: drafter)
    fields = dict(tree="regular:2x1", batch=2, context=64, page_size=16)
    return compilation.Job(model="tiny", **{**fields, **changes})


@pytest.mark.parametrize("tree", ["none", "regular:2x1", "dynamic:7@3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_lowers_for_cuda(monkeypatch, tree, dtype):
    """All that needs no GPU: the program that its compiler would get."""
    engine = compilation.abstract_engine(tiny_job(monkeypatch, tree=tree, dtype=dtype))
    function, arguments = engine.program()
    traced = jax.jit(function, donate_argnums=1).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and "tf.aliasing_output" in text


@pytest.mark.slow
def test_step_on_one_v5e(tpu_compiler, monkeypatch):
    """Without a mesh the same program but for collectives: two layers tell."""
    narrow = dict(vocab_size=2048, mlp_dim=1024, num_layers=2)
    c = dataclasses.replace(presets.get("llama-3.2-1b"), **narrow)
    job = tiny_job(monkeypatch, c, tree="chain:1", context=2048, page_size=128)
    kinds = []
    for name in ("choose", "default_sizes"):
        own = getattr(api, name)
        monkeypatch.setattr(api, name, recorder(kinds, own))
    result = compilation.compile_step(job)
    assert result.report.num_devices == 1
    assert result.report.instances == {"tree_attention": 3}
    assert "all-reduce" not in result.text
    caches = 2 * (2048 // 128 * 2 + 1) * 8 * 128 * LANES * 2
    assert result.report.aliased_bytes >= caches
    # Block sizes are those of the device that it is compiled for.
    assert len(kinds) > 2 and set(kinds) == {"TPU v5 lite"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "model"), [("v5e:2x4", "llama-3-8b"), ("v6e:2x4", "qwen3-32b")]
)
def test_eight_devices_share_a_large_model(tpu_compiler, topology, model):
    """Two of its layers at full width; `tpu_report` compiles all of them.

    Two all-reduces a layer, during which the weights of what follows are fetched.
    """
    job = compilation.Job(topology, model, tree="chain:1", batch=4, devices=8, layers=2)
    report = compilation.compile_step(job).report
    assert report.num_devices == 8
    assert report.instances == {"tree_attention": 2 + 4}
    c = job.target
    rows = job.batch * 2 * c.embed_dim * 2
    (reduced,) = (
        x for x in report.collectives if x.kind == "all-reduce" and x.size == rows
    )
    # One more where the embedding's rows come together.
    assert reduced.count == 2 * c.num_layers + 1
    # Of so few layers not all: little is left to fetch. docs/tpu.md has all layers.
    assert reduced.beside >= 2
    layer = 3 * c.mlp_dim * c.embed_dim * 2 // 8
    # Nothing as large as a weight travels.
    assert all(x.size < layer for x in report.collectives)


def recorder(kinds, own):
    def call(*args):
        kinds.extend(x for x in args if x is None or isinstance(x, str))
        return own(*args)

    return call


def test_abstract_engines_hold_no_weights(monkeypatch):
    """A model of any size costs nothing to describe."""
    engine = compilation.abstract_engine(dataclasses.replace(JOB, model="llama-3-8b"))
    _, (leaves, state, _) = engine.program()
    leaves = jax.tree.leaves((leaves, state))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) > 8e9
    assert state.pages[0].dtype == jnp.bfloat16


def test_more_devices_than_the_topology_has(tpu_compiler, monkeypatch):
    with pytest.raises(UserError, match="devices=8 is more than the 4 of v5e:2x2"):
        compilation.compile_step(tiny_job(monkeypatch, devices=8))
    assert len(aot.topology_devices("v5e:2x2")) == 4
