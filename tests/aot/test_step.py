"""The whole step (draft, verify, accept, commit) by the compilers of other machines."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from tests.conftest import TINY
from treespec_jax.errors import UserError
from treespec_jax.experiments import tpu_report
from treespec_jax.models import presets
from treespec_jax.models.flat import FlatModule

JOB = tpu_report.Job(tree="chain:3")
GIB = 1 << 30


@pytest.mark.slow
def test_step_of_a_1b_model_on_v5e(tpu_compiler):
    """Llama 3.2 1B and a small drafter fit a v5e; the caches are updated in place."""
    report = tpu_report.compile_step(JOB).report
    c = presets.get("llama-3.2-1b")
    weights = tpu_report.abstract_model(c, "bfloat16")
    size = sum(leaf.size * 2 for leaf in FlatModule(weights).leaves)
    assert 2.4e9 < size < 2.5e9
    rows = JOB.batch * JOB.context * 2 * 2
    caches = rows * sum(
        m.num_layers * m.num_kv_heads * m.head_dim for m in (JOB.target, JOB.drafter)
    )
    assert report.argument_bytes > size + caches
    assert report.aliased_bytes >= caches
    assert report.argument_bytes + report.temporary_bytes < 16 * GIB
    # Heads of 64 lie in padded pages, which the kernel reads: once per layer of the
    # target, and per layer and level of the drafter.
    calls = JOB.target.num_layers + 3 * JOB.drafter.num_layers
    assert report.instances == {"tree_attention": calls}
    # Nothing of the order of a cache is held twice.
    assert report.temporary_bytes < caches
    per_token = 2 * (size // 2)
    assert report.flops > JOB.batch * 4 * per_token
    assert report.least_bytes > size + caches
    assert report.roofline.memory > size / JOB.kind.bandwidth


def tiny_job(monkeypatch, **changes) -> tpu_report.Job:
    target = dataclasses.replace(TINY, vocab_size=256)
    drafter = dataclasses.replace(target, num_layers=1)
    monkeypatch.setattr(presets, "get", lambda name: target)
    monkeypatch.setattr(tpu_report, "small_drafter", lambda config: drafter)
    fields = dict(tree="regular:2x1", batch=2, context=64, page_size=16)
    return tpu_report.Job(model="tiny", **{**fields, **changes})


@pytest.mark.parametrize("tree", ["none", "regular:2x1", "dynamic:7@3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_step_lowers_for_cuda(monkeypatch, tree, dtype):
    """All that needs no GPU: the program that its compiler would get."""
    engine = tpu_report.abstract_engine(tiny_job(monkeypatch, tree=tree, dtype=dtype))
    function, arguments = engine.program()
    traced = jax.jit(function, donate_argnums=1).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and "tf.aliasing_output" in text


@pytest.mark.slow
def test_step_on_a_mesh(tpu_compiler, monkeypatch):
    """Weights and caches are cut over four chips; each holds about a quarter."""
    job = tiny_job(monkeypatch, tree="none")
    wide = dataclasses.replace(
        job.target, num_heads=8, num_kv_heads=4, mlp_dim=512, vocab_size=512
    )
    monkeypatch.setattr(presets, "get", lambda name: wide)
    alone = tpu_report.compile_step(job)
    shared = tpu_report.compile_step(dataclasses.replace(job, devices=4))
    assert (alone.report.num_devices, shared.report.num_devices) == (1, 4)
    assert "all-reduce" in shared.text and "all-reduce" not in alone.text
    assert shared.report.argument_bytes < 0.5 * alone.report.argument_bytes


def test_abstract_engines_hold_no_weights(monkeypatch):
    """A model of any size costs nothing to describe."""
    engine = tpu_report.abstract_engine(dataclasses.replace(JOB, model="llama-3-8b"))
    _, (leaves, state, _) = engine.program()
    leaves = jax.tree.leaves((leaves, state))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) > 8e9
    assert state.pages[0].dtype == jnp.bfloat16


def test_more_devices_than_the_topology_has(tpu_compiler, monkeypatch):
    with pytest.raises(UserError, match="asks for 8 devices, there are 4"):
        tpu_report.compile_step(tiny_job(monkeypatch, devices=8))
    assert len(aot.topology_devices("v5e:2x2")) == 4
