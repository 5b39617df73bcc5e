"""Every implementation against the contract; kernels through interpreters."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tree_attention import GpuBlockSizes
from tests.kernels.contract import CALLS, TreeAttentionContract, cases, check

pytestmark = pytest.mark.slow


class TestReference(TreeAttentionContract):
    implementation = "reference"


class TestTpuKernel(TreeAttentionContract):
    implementation = "tpu"
    interpret = True

    def block_sizes(self, call):
        return call.sizes

    # What both kinds of waits, partial blocks, windows and scales need.
    @pytest.mark.parametrize("name", ["heads", "window and cap", "int8, window"])
    def test_copies_do_not_race(self, name, capfd):
        """The slow interpreter checks every access against every copy in flight."""
        call = CALLS[name]
        case, want = list(cases(call))[1]
        out = self.run(call, case, interpret=pltpu.InterpretParams(detect_races=True))
        check(call, out, want)
        assert "RACE" not in "".join(capfd.readouterr())


class TestGpuKernel(TreeAttentionContract):
    implementation = "gpu"
    interpret = True
    joins = False

    def block_sizes(self, call):
        """Three parts of the prefix where the queries of a slot and head fit one
        tile; blocks of one page or of several."""
        return GpuBlockSizes(
            rows=16, keys=32, warps=4, stages=2, programs=12, split_rows=32
        )
