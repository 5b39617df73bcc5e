"""Differences between the supported jax versions that kernels meet."""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated in jax 0.11, and to be removed one day
    triton = None


def gpu_target(device_kind: str = "NVIDIA H100"):
    """A context in which kernels lower for a GPU that this machine need not have.

    jax 0.10 assumes compute capability 9.0 by itself where there is no GPU, and knows
    no abstract one; from 0.11 on, the kind of device has to be said.

    Args:
      device_kind: as `jax.Device.device_kind` says, e.g. "NVIDIA A100-SXM4-80GB".
    """
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
