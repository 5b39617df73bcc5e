"""The engine's whole step, lowered for CUDA on whatever machine this is."""

from __future__ import annotations

import pytest

from tests.kernels.triton_modules import lower_for_cuda, triton_modules
from treespec_jax.measurement.compilation import Job, abstract_engine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tree", ["none", "dynamic:15@4"])
def test_the_step_lowers_with_the_gpu_kernel(tree):
    """Draft, verify, accept and commit with Llama 3.2 1B in bfloat16."""
    job = Job(model="llama-3.2-1b", tree=tree)
    function, arguments = abstract_engine(job).program()
    lowered = lower_for_cuda(function, *arguments)
    modules = triton_modules(lowered)
    # One kernel per shape of call; the layers of a model share it.
    assert len(modules) == 1 if tree == "none" else len(modules) > 1
    for module in modules:
        assert "module @tree_attention" in module and module.count("tt.dot ") == 6
    assert "tpu_custom_call" not in lowered.as_text()
