"""Read bandwidth of the memory that the weights lie in."""

from __future__ import annotations

import concurrent.futures
import time

import numpy as np

from treespec_jax.measurement.versions import usable_cpus

# Well beyond any last-level cache.
BYTES = 512 << 20


class ReadBandwidth:
    """Measures on demand; the best sample counts, as any other was disturbed.

    On a CPU every thread reads its part of a large array with a BLAS dot product;
    elsewhere one compiled sum reads it on the device.

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

        self.samples: list[float] = []
        threads = threads or usable_cpus()
        size = size or BYTES
        count = size // 4
        if jax.default_backend() == "cpu":
            self._parts = np.array_split(np.ones(count, np.float32), threads)
            self._pool = concurrent.futures.ThreadPoolExecutor(threads)
            self._read = self._read_host
            self.method = (
                f"{threads} threads read {size >> 20} MiB of float32 with a dot "
                "product each; best of the samples taken between the measurements"
            )
        else:
            x = jnp.ones(count, jnp.float32)
            total = jax.jit(jnp.sum)
            self._read = lambda: total(x).block_until_ready()
            self.method = (
                f"a compiled sum reads {size >> 20} MiB of float32 on the device; "
                "best of the samples taken between the measurements"
            )
        self._size = count * 4
        self._read()

    def _read_host(self) -> None:
        list(self._pool.map(lambda part: np.dot(part, part), self._parts))

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
