"""Which implementation runs, what it refuses, and what holds of every one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import (
    AttentionSpec,
    BlockSizes,
    quantize_rows,
    tree_attention,
)
from tests.kernels.oracle import cast, make_case

pytestmark = pytest.mark.slow

SIZES = BlockSizes(block_rows=32, rows=16, max_rows=64)
KERNELS = ("tpu", "gpu")
SPEC = AttentionSpec(scale=0.1)
REFERENCE = AttentionSpec(scale=0.1, implementation="reference")
TPU = AttentionSpec(scale=0.1, implementation="tpu")
attend = jax.jit(tree_attention, static_argnums=1)


def interpreted(implementation: str) -> AttentionSpec:
    return AttentionSpec(
        scale=0.1, implementation=implementation, block_sizes=SIZES, interpret=True
    )


def a_case(**changes):
    given = dict(B=1, T=5, G=2, page=16, lengths=(21,), H=128, max_pages=2)
    return cast(make_case(np.random.default_rng(0), **given | changes))


@pytest.mark.parametrize("implementation", KERNELS)
def test_permuting_siblings_permutes_rows(implementation):
    case = a_case()
    case.tree_mask[0] = np.eye(5, dtype=bool)
    case.tree_mask[0, :, 0] = True
    order = np.array([0, 3, 1, 4, 2])
    moved = dataclasses.replace(
        case, queries=case.queries[:, order], tree_kv=case.tree_kv[:, :, :, order]
    )
    out, other = (
        np.asarray(attend(c, interpreted(implementation))) for c in (case, moved)
    )
    np.testing.assert_allclose(other, out[:, order], atol=2e-6)
    assert np.abs(out - out[:, order]).max() > 1e-2


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_node_feels_its_ancestors_only(implementation):
    """Changing one tree row changes the rows that may see it, and no other bit."""
    case = a_case()
    before = np.asarray(attend(case, interpreted(implementation)))
    for node in range(5):
        changed = dataclasses.replace(case, tree_kv=case.tree_kv.copy())
        changed.tree_kv[0, :, :, node] += 1.0
        after = np.asarray(attend(changed, interpreted(implementation)))
        felt = (before != after).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(felt, case.tree_mask[0, :, node])


@pytest.mark.parametrize("implementation", KERNELS)
def test_without_a_prefix(implementation):
    """The same as with an empty one, and its gradient is the reference's."""
    case, spec = a_case(lengths=(0,)), interpreted(implementation)
    none = dict.fromkeys(("kv_pages", "page_table", "lengths"))
    bare = dataclasses.replace(case, **none)
    np.testing.assert_allclose(attend(bare, spec), attend(case, spec), atol=1e-6)

    def loss(kv, run, spec):
        return jnp.sum(run(dataclasses.replace(bare, tree_kv=kv), spec)[..., 0] ** 2)

    ours = jax.grad(loss)(case.tree_kv, attend, spec)
    theirs = jax.grad(loss)(case.tree_kv, tree_attention, REFERENCE)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs).max() > 1e-2
    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.grad(lambda q: jnp.sum(attend(dataclasses.replace(case, queries=q), spec)))(
            case.queries
        )


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_does_not_run_elsewhere(implementation):
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        tree_attention(
            a_case(), AttentionSpec(scale=0.1, implementation=implementation)
        )


def kernels_in(case, spec) -> set[str]:
    """The kernels in a program, told apart by their compilers' parameters."""
    call = functools.partial(tree_attention, spec=spec)
    program = str(jax.make_jaxpr(call)(case))
    marks = {"tpu": "vmem_limit_bytes=", "gpu": "num_warps="}
    return {name for name, mark in marks.items() if mark in program}


def test_the_platform_chooses():
    """The kernels are in the program, and other platforms' lowering leaves them out."""
    case = a_case()
    assert kernels_in(case, SPEC) == {"tpu", "gpu"}
    for name in KERNELS:
        named = AttentionSpec(scale=0.1, implementation=name)
        assert kernels_in(case, named) == {name}
    assert not kernels_in(case, REFERENCE)
    assert not kernels_in(case, dataclasses.replace(SPEC, device_kind="cpu"))
    text = attend.lower(case, SPEC).as_text()
    assert "while" in text and "custom_call" not in text
    out = attend(case, SPEC)
    plain = tree_attention(case, REFERENCE)
    np.testing.assert_allclose(out, plain, atol=1e-6)


REFUSED = {
    "rows of 64 numbers are not whole lanes: make kv_pages 128 wide": dict(H=64),
    "pages of 8 rows are not multiples of 16": dict(page=8),
    "is more than 524288 bytes": dict(B=2, lengths=(0, 0), max_pages=70000, H=128, K=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_shapes_that_the_kernel_cannot_take(message):
    """Named, it is an error that says why; unnamed, the reference runs there."""
    changes = REFUSED[message]
    pages = changes.pop("max_pages", None)
    case = a_case(**changes)
    if pages:
        table = np.zeros((2, pages), np.int32)
        case = dataclasses.replace(case, page_table=table)
    with pytest.raises(ValueError, match=message):
        tree_attention(case, TPU)
    assert kernels_in(case, SPEC) == {"gpu"}


def test_types_that_the_kernel_cannot_take():
    case = a_case()
    for name, message in [
        ("tree_kv", "tree_kv bfloat16"),
        ("kv_pages", "kv_pages is bfloat16"),
    ]:
        changed = {name: getattr(case, name).astype(jnp.bfloat16)}
        with pytest.raises(ValueError, match=message):
            tree_attention(dataclasses.replace(case, **changed), TPU)


def test_memory_that_does_not_suffice():
    sizes = BlockSizes(vmem_bytes=2**20)
    with pytest.raises(ValueError, match="one block needs .* of 1048576 bytes"):
        tree_attention(a_case(), dataclasses.replace(TPU, block_sizes=sizes))


def test_scales_belong_to_int8_pages():
    case = a_case()
    pages = case.kv_pages
    rows, scales = quantize_rows(pages)
    for wrong, given, message in [
        (rows, None, "kv_pages is int8 and kv_scales missing"),
        (pages, scales, "kv_pages is float32 and kv_scales given"),
        (rows, scales[..., :8], "kv_scales is .* want"),
        (None, scales, "without kv_pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            changed = dict(kv_pages=wrong, kv_scales=given)
            tree_attention(dataclasses.replace(case, **changed), SPEC)
    with pytest.raises(ValueError, match="scales of 16 rows are not whole lanes"):
        changed = dict(kv_pages=rows, kv_scales=scales)
        tree_attention(dataclasses.replace(case, **changed), TPU)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(interpret=True), "needs a kernel's name, not None"),
        (dict(implementation="magic"), "no implementation 'magic'.*reference"),
        (dict(window=0), "window=0: want at least 1"),
        (dict(soft_cap=0.0), "soft_cap=0.0: want a positive cap"),
        (dict(heads_axis="tensor"), "heads_axis='tensor' is not an axis of the mesh"),
    ],
)
def test_settings_check_themselves(wrong, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(scale=0.1, **wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(buffers=1), "buffers=1"),
        (dict(rows=24), "rows=24 is not a multiple of 16"),
        (dict(rows=128, max_rows=200), "max_rows=200"),
        (dict(heads=2, unroll=4), "unroll=4 is more than heads=2"),
        (dict(block_rows=0), "block_rows=0"),
    ],
)
def test_block_sizes_check_themselves(wrong, message):
    with pytest.raises(ValueError, match=message):
        BlockSizes(**wrong)


def test_quantised_rows():
    """Within half a step of the row, zeros kept, in a form that commit can write."""
    rows = np.random.default_rng(1).normal(size=(3, 4, 16)).astype(np.float32)
    rows[1, 2] = 0.0
    rows[0, 1] *= 1e-6
    whole, scales = (np.asarray(x) for x in quantize_rows(jnp.asarray(rows)))
    assert whole.dtype == np.int8 and scales.dtype == np.float32
    assert scales[1, 2] == 0 and not whole[1, 2].any()
    error = np.abs(whole * scales[..., None] - rows)
    assert (error <= scales[..., None] * 0.5001).all()
    largest = np.abs(whole).max(axis=-1)
    assert (largest[scales > 0] == 127).all()
