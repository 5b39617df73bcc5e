"""Real compilations for TPUs, on whatever machine this is."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import aot

PAGES, ROWS, WIDTH = 20_000, 128, 128
SHAPES = (
    jax.ShapeDtypeStruct((2,), jnp.int32),
    jax.ShapeDtypeStruct((PAGES, ROWS, WIDTH), jnp.bfloat16),
)


def sum_of_squares(counts, pages):
    """Per slot, pages[:count] products summed: one copy and one product per page."""

    def kernel(counts_ref, pages_hbm, out_ref, buffer, arrived):
        out_ref[...] = jnp.zeros_like(out_ref)

        def body(i, _):
            copy = pltpu.make_async_copy(pages_hbm.at[i], buffer, arrived)
            copy.start()
            copy.wait()
            out_ref[...] += jnp.dot(
                buffer[...], buffer[...], preferred_element_type=jnp.float32
            )
            return 0

        lax.fori_loop(0, counts_ref[pl.program_id(0)], body, 0)

    return pl.pallas_call(
        kernel,
        name="squares",
        out_shape=jax.ShapeDtypeStruct((2 * ROWS, WIDTH), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((ROWS, WIDTH), lambda slot, counts: (slot, 0)),
            scratch_shapes=[
                pltpu.VMEM((ROWS, WIDTH), jnp.bfloat16),
                pltpu.SemaphoreType.DMA,
            ],
        ),
    )(counts, pages)


@pytest.mark.parametrize("kind", list(aot.DEVICE_KINDS))
def test_kernel_on_every_generation(tpu_compiler, kind):
    entry = aot.DEVICE_KINDS[kind]
    report = aot.compile_for(entry.topology, sum_of_squares, *SHAPES).report
    assert (report.device, report.num_devices) == (kind, 1)
    assert report.instances == {"squares": 1}
    assert report.temporary_bytes == 0
    assert report.least_bytes == 8 + PAGES * ROWS * WIDTH * 2 + 2 * ROWS * WIDTH * 4
    assert report.argument_bytes >= PAGES * ROWS * WIDTH * 2
    pages = report.kernel("squares").innermost
    assert pages.depth == 2
    assert pages.copied == {"hbm_to_vmem": ROWS * WIDTH * 2}
    assert 0 < pages.mix.mxu_share < 1 and pages.mix.spills == 0
    assert pages.cycles > pages.bundles
    assert json.loads(json.dumps(report.to_dict()))["source"] == "compiler's estimates"
    with pytest.raises(KeyError, match="squares"):
        report.kernel("circles")


def test_plain_program(tpu_compiler):
    """Donated memory is reused; time comes with the roofline."""

    def f(x, w):
        return x + jnp.tanh(x @ w)

    x, w = (jax.ShapeDtypeStruct((n, 1024), jnp.bfloat16) for n in (4096, 1024))
    result = aot.compile_for("v5e:2x2", f, x, w, donate_argnums=0, kernels=False)
    report = result.report
    assert report.aliased_bytes == report.output_bytes == 4096 * 1024 * 2
    assert report.least_bytes == (2 * 4096 + 1024) * 1024 * 2
    assert report.flops == pytest.approx(2 * 4096 * 1024**2, rel=0.01)
    assert report.optimal_seconds > 0 and report.estimated_cycles > 0
    kind = aot.DEVICE_KINDS["v5e"]
    assert report.roofline.compute == pytest.approx(report.flops / kind.bf16_flops)
    assert report.roofline.memory == report.least_bytes / kind.bandwidth
    assert report.kernels == () and "HloModule" in result.text
    # All goes through HBM once; XLA counts what it keeps in vector memory too.
    assert report.traffic.kernels == 0
    assert 1 <= report.traffic.total / report.least_bytes < 1.1


def test_mesh(tpu_compiler):
    """Four devices share the contraction; all figures are of one of them."""
    mesh = Mesh(np.array(aot.topology_devices("v5e:2x2")), ("model",))

    def shape(size, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding)

    def f(x, w):
        whole = NamedSharding(mesh, PartitionSpec())
        return lax.with_sharding_constraint(x @ w, whole)

    result = aot.compile_for(
        "v5e:2x2", f, shape((256, 4096), None, "model"), shape((4096, 512), "model")
    )
    assert result.report.num_devices == 4
    assert result.report.least_bytes == (256 * 1024 + 1024 * 512 + 256 * 512) * 2
    assert "all-reduce" in result.text


def test_what_the_compiler_refuses(tpu_compiler):
    """Too large for VMEM: the interpreter would take it."""

    def kernel(x_ref, out_ref, scratch):
        scratch[:8] = x_ref[...]
        out_ref[...] = scratch[:8]

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    large = pl.pallas_call(
        kernel,
        name="large",
        out_shape=x,
        scratch_shapes=[pltpu.VMEM((1 << 20, 128), jnp.float32)],
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        aot.compile_for("v5e:2x2", large, x)


def test_unknown_topologies(tpu_compiler):
    with pytest.raises(ValueError, match=r"unknown TPU topology 'v9:2x2'.* v5e:2x2"):
        aot.compile_for("v9:2x2", lambda: 0)
    with pytest.raises(ValueError, match=r"refuses topology 'v5e:3x'.*v5e:2x2"):
        aot.compile_for("v5e:3x", lambda: 0)


def test_missing_compiler(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "libtpu" else find(name),
    )
    with pytest.raises(aot.CompilerUnavailable, match=r"pip install 'jax\[tpu\]'") as e:
        aot.compile_for("v5e:2x2", lambda: 0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", list(aot.DEVICE_KINDS))
def test_rates_agree_with_those_of_pallas(kind):
    """Two sources; theirs rounds, and counts one core of a chip where there are two."""
    entry = aot.DEVICE_KINDS[kind]
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[entry.chip], 1)
    cores = 2 if kind == "v5p" else 1  # one device there is both cores
    assert entry.bf16_flops == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
    bandwidth = cores * info.mem_bw_bytes_per_second
    assert entry.bandwidth == pytest.approx(bandwidth, rel=0.13)
    per_cycle = 2 * info.num_mxus * info.mxu_column_size**2
    rows = entry.bf16_flops / cores / per_cycle / entry.clock
    assert rows == pytest.approx({"v6e": 2, "tpu7x": 2}.get(kind, 1), rel=0.02)


def test_device_kinds_by_name():
    for entry in aot.DEVICE_KINDS.values():
        assert aot.device_kind(entry.topology) is entry
        assert aot.device_kind(entry.kind) is entry
    # 64 KiB at 819 GB/s is 80 ns, at 1.5 GHz 120 cycles.
    assert aot.DEVICE_KINDS["v5e"].stream_cycles(65536) == pytest.approx(120, rel=0.01)


def test_traffic_of_a_donated_update(tpu_compiler):
    """A row written into a table in place, and rows looked up.

    XLA charges the table at every turn.
    """
    table = jax.ShapeDtypeStruct((50_000, 1024), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)

    def f(table, ids):
        rows = table[ids]
        row = jnp.tanh(rows.sum(0, keepdims=True))
        return lax.dynamic_update_slice(table, row, (ids[0], 0)), rows

    report = aot.compile_for(
        "v5e:2x2", f, table, ids, donate_argnums=0, kernels=False
    ).report
    rows = 16 * 1024 * 2
    assert rows < report.traffic.total < 10 * rows < report.least_bytes / 100


TEXT = """
HloModule made_up

%fused (param_0: bf16[64,128], param_1: s32[]) -> bf16[8,128] {
  %param_0 = bf16[64,128]{1,0} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %c = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[8,128]{1,0} dynamic-slice(%param_0, %param_1, %c)
}

%little (x: bf16[64,128]) -> bf16[1,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %one = bf16[1,128]{1,0:S(1)} slice(%x)
}

%much (y: bf16[64,128]) -> bf16[1,128] {
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all = bf16[1,128]{1,0:S(1)} reduce(%y)
}

ENTRY %main (a: bf16[64,128], i: s32[]) -> bf16[8,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %b = bf16[1,128]{1,0:S(1)} conditional(%i, %a, %a), \
branch_computations={%little, %much}
  %s = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %d = bf16[16,128]{1,0:S(1)} slice-done(%s)
  %k = f32[8]{0} custom-call(%a, %d), custom_call_target="tpu_custom_call"
  %e = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"1","bytes_accessed":"77"}}
  ROOT %f = bf16[8,128]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%fused
}
"""


EXCHANGED = """
HloModule made_up

%started (param_0: f32[4,128]) -> (f32[4,128], f32[32,128], u32[]) {
  %param_0 = f32[4,128]{1,0} parameter(0)
  %inside = f32[32,128]{1,0} all-gather(%param_0), dimensions={0}
  ROOT %whole = (f32[4,128]{1,0}, f32[32,128]{1,0}, u32[]) custom-call(%inside), \
custom_call_target="AsyncCollectiveStart"
}

ENTRY %main (a: bf16[64,128], x: f32[4,128]) -> f32[4,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[4,128]{1,0} parameter(1)
  %r0 = f32[4,128]{1,0} all-reduce(%x), to_apply=%sum
  %s = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %r1 = f32[4,128]{1,0} all-reduce(%r0), to_apply=%sum
  %d = bf16[16,128]{1,0:S(1)} slice-done(%s)
  %g = (f32[4,128]{1,0}, f32[32,128]{1,0}, u32[]) fusion(%r1), calls=%started
  %p = (f32[4,128]{1,0}, f32[4,128]{1,0}) collective-permute-start(%r1)
  %q = f32[4,128]{1,0} collective-permute-done(%p)
  ROOT %r2 = f32[4,128]{1,0} all-reduce(%q), to_apply=%sum
}
"""


def test_collectives_by_hand():
    """One of three all-reduces runs while a slice of a weight is under way."""
    row, fetched = 4 * 128 * 4, 16 * 128 * 2
    assert aot.collectives(EXCHANGED) == (
        aot.Collective("all-gather", 1, 8 * row, 1, 0),
        aot.Collective("all-reduce", 3, row, 1, fetched // 3),
        aot.Collective("collective-permute", 1, row, 1, 0),
    )


def test_traffic_by_hand():
    """Of the two sides of the conditional the one that reads more counts."""
    assert aot.hbm_traffic(TEXT) == aot.Traffic(
        fetched=16 * 128 * 2,
        kernels=64 * 128 * 2 + 8 * 4 + 77,
        computed=(8 + 64) * 128 * 2,
    )
    with pytest.raises(ValueError, match="no HLO program"):
        aot.hbm_traffic("nothing")
