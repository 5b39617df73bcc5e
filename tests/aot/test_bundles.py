"""Reading machine programs; the samples' figures were counted by hand.

The samples are the compiler's output for one small kernel: a loop over slots, and in it
a loop over pages with a copy, a `pl.when` and a product.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pallas_kernels.aot import DEVICE_KINDS, read_kernel

SAMPLES = Path(__file__).parent / "samples"


def sample(kind: str) -> dict[str, str]:
    return {
        part: (SAMPLES / f"{kind}_{part}.txt").read_text()
        for part in ("program", "utilization", "schedule")
    }


def read(kind: str, **changed: str):
    return read_kernel(
        "sample.1", **{**sample(kind), **changed}, kind=DEVICE_KINDS[kind]
    )


@pytest.mark.parametrize(
    ("kind", "bundles", "outer", "inner", "skippable", "cycles"),
    [
        ("v5e", 71, (0x7, 0x42), (0x15, 0x3B), 8, (219, 0xCB - 0x15 + 1)),
        # Delays after branches vary here: 0x48 has one bundle, 0x3f has six.
        ("tpu7x", 78, (0xD, 0x49), (0x1B, 0x45), 5, (319, 0x12D - 0x20 + 1)),
    ],
)
def test_loops(kind, bundles, outer, inner, skippable, cycles):
    kernel = read(kind)
    assert kernel.bundles == bundles
    assert (kernel.cycles, kernel.loops[1].cycles) == cycles
    slots, pages = kernel.loops
    assert [(x.first, x.last) for x in kernel.loops] == [outer, inner]
    assert (slots.parent, pages.parent) == (None, 0)
    assert (slots.depth, pages.depth) == (1, 2)
    assert pages.bundles == inner[1] - inner[0] + 1
    assert slots.bundles == outer[1] - outer[0] + 1 - pages.bundles
    assert pages.skippable == skippable
    assert kernel.innermost is pages


def test_copies():
    """A page is 16 rows of 128 bf16; the copy that a bounds check quotes is no copy."""
    for kind in ("v5e", "tpu7x"):
        slots, pages = read(kind).loops
        assert pages.copied == {"hbm_to_vmem": 16 * 128 * 2}
        assert (slots.copied, pages.unsized) == ({}, 0)
    assert read("v5e").copied == {"hbm_to_smem": 512}


def test_copy_of_unknown_size():
    program = sample("v5e")["program"]
    program = program.replace("granules=*/128, /*vmem", "granules=*/%s9_s4, /*vmem")
    pages = read("v5e", program=program).loops[1]
    assert (pages.copied, pages.unsized) == ({}, 1)


def test_mix():
    kernel = read("v5e")
    slots, pages = kernel.loops
    assert kernel.mix.slots["MXU"] == 16 == kernel.mix.mxu_bundles
    assert slots.mix.slots["MXU"] + pages.mix.slots["MXU"] < 16  # the rest: set-up
    assert pages.mix.slots["VLOAD"] == 9 and pages.mix.slots["VSTORE"] == 4
    # 21 scalar instructions at two a bundle bound it more than 9 loads at three.
    assert (pages.mix.bound, pages.mix.bound_unit) == (11, "SALU")
    assert pages.mix.mxu_share == 8 / 39
    assert (kernel.mix.fills, kernel.mix.spills) == (0, 0)


def test_spills():
    head, body = sample("v5e")["utilization"].split("== UTILIZATION:\n")
    rows = [row.split() for row in body.splitlines()]
    rows[0x30][6], rows[0x30][8] = "3", "2"
    rows[0x05][8] = "1"
    body = "\n".join(" ".join(row) for row in rows)
    kernel = read("v5e", utilization=f"{head}== UTILIZATION:\n{body}\n")
    assert (kernel.mix.fills, kernel.mix.spills) == (3, 3)
    assert (kernel.loops[1].mix.fills, kernel.loops[1].mix.spills) == (3, 2)


@pytest.mark.parametrize(
    ("part", "cut", "expected"),
    [
        ("utilization", lambda x: x.rsplit("\n", 2)[0], "71 bundles, but 70 rows"),
        ("utilization", lambda x: x.replace("MXU", "TXU"), "another form"),
        ("utilization", lambda x: "nothing", "another form"),
        ("program", lambda x: "nothing", "0 bundles"),
        ("program", lambda x: x.replace("  0x3d ", "  0xff "), "bundle 61 is missing"),
        ("program", lambda x: x.replace("$region55", "$region49"), "no branch back"),
        ("schedule", lambda x: x.split("0x15 LB")[0], "no branch back"),
        ("schedule", lambda x: "nothing", "other loops"),
    ],
)
def test_dumps_of_another_form(part, cut, expected):
    with pytest.raises(ValueError, match=expected):
        read("v5e", **{part: cut(sample("v5e")[part])})
