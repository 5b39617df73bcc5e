"""The TPU compiler, where it can be."""

from __future__ import annotations

import importlib.util
import platform

import pytest


@pytest.fixture(scope="session")
def tpu_compiler():
    """Skips where libtpu cannot be; fails, by use, where it is there but broken."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86-64 only")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the test extra brings it")
    from pallas_kernels import aot

    aot.prepare()
    return aot
