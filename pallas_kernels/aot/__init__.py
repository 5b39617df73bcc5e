"""What the TPU compiler says of a program, on a machine without a TPU.

    from pallas_kernels import aot
    result = aot.compile_for("v5e:2x2", function, *shapes)
    print(result.report.kernels[0].loops)

All figures are the compiler's estimates, never measurements.
"""

from pallas_kernels.aot.bundles import KernelReport, Loop, read_kernel
from pallas_kernels.aot.collectives import Collective, collectives
from pallas_kernels.aot.compiler import (
    Compilation,
    CompilerUnavailable,
    Report,
    compile_for,
    prepare,
    topology_devices,
)
from pallas_kernels.aot.devices import DEVICE_KINDS, DeviceKind, Roofline, device_kind
from pallas_kernels.aot.traffic import Traffic, hbm_traffic

__all__ = [
    "DEVICE_KINDS",
    "Collective",
    "Compilation",
    "CompilerUnavailable",
    "DeviceKind",
    "KernelReport",
    "Loop",
    "Report",
    "Roofline",
    "Traffic",
    "collectives",
    "compile_for",
    "device_kind",
    "hbm_traffic",
    "prepare",
    "read_kernel",
    "topology_devices",
]
