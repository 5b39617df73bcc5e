"""What a result was obtained with."""

from __future__ import annotations

import os
import platform
from typing import Any


def versions() -> dict[str, Any]:
    """Versions of Python and packages, machine and devices, as plain values."""
    import flax
    import jax
    import jaxlib
    import numpy

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cpus": usable_cpus(),
    }


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
