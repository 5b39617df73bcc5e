"""This machine: what results are obtained with, and its memory's read bandwidth."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Read per sample: well beyond any last-level cache.
BYTES = 512 << 20


def versions() -> dict[str, Any]:
    """Versions of Python and packages, machine and devices, as plain values."""
    import jax

    device = jax.devices()[0]
    packages = "treespec-jax", "jax", "jaxlib", "flax", "numpy"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cpus": usable_cpus(),
    }


def _version(package: str) -> str:
    """Of an installed package; "source" for one that runs from its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The most memory that this process has been using."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes but on a Mac.
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that a process may still take; None where the system does not tell.

    A container may allow less than the machine has.
    """
    rooms = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        rooms.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        most, used = (
            int((folder / name).read_text("ascii"))
            for name in ("memory.max", "memory.current")
        )
        rooms.append(most - used)
    return min(rooms, default=None)


def peak_device_bytes() -> int | None:
    """The most memory in use on the first device; None where it does not tell."""
    import jax

    found = jax.devices()[0].memory_stats() or {}
    return found.get("peak_bytes_in_use")


class ReadBandwidth:
    """Measures on demand; the best sample counts, as any other was disturbed.

    On a CPU every thread reads its part of a large array with a BLAS dot product.
    Elsewhere the device copies it, and what is read and what is written count: a sum
    of float32 is bound by its additions there, and products read more than that.

    Args:
      threads: of a CPU; None: one for each that this process may use.
      size: bytes to read per sample; None: BYTES.

    Attributes:
      samples: bytes per second of each measurement.
      method: in words.
    """

    def __init__(self, threads: int | None = None, size: int | None = None):
        import jax
        import jax.numpy as jnp

        threads, count = threads or usable_cpus(), (size or BYTES) // 4
        mib = f"{count >> 18} MiB of float32"
        if jax.default_backend() == "cpu":
            parts = np.array_split(np.ones(count, np.float32), threads)
            pool = concurrent.futures.ThreadPoolExecutor(threads)
            self._read = lambda: list(pool.map(np.dot, parts, parts))
            method = f"{threads} threads read {mib} with a dot product each"
        else:
            # An exact copy could be left out by the compiler.
            x, change = jnp.ones(count, jnp.uint32), jax.jit(lambda x: x ^ 1)
            self._read = lambda: change(x).block_until_ready()
            method = f"a copy of {mib} on the device, bytes read and written"
        self.method = f"{method}; best of the samples taken between the measurements"
        self.samples: list[float] = []
        self._size = count * 4 * (1 if jax.default_backend() == "cpu" else 2)
        self._read()

    def sample(self, times: int = 3) -> None:
        """Takes a few samples."""
        for _ in range(times):
            began = time.perf_counter()
            self._read()
            self.samples.append(self._size / (time.perf_counter() - began))

    @property
    def best(self) -> float:
        """Bytes per second."""
        return max(self.samples)
