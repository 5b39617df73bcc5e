"""Compiles a function for a TPU that is not there, and asks the compiler about it."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.util
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.aot.bundles import KernelReport, read_kernel
from pallas_kernels.aot.collectives import Collective, collectives
from pallas_kernels.aot.devices import DeviceKind, Roofline, device_kind
from pallas_kernels.aot.traffic import Traffic, hbm_traffic
from pallas_kernels.machine import has_tpu

# Without these the library asks the network for its host, warns that there is none, and
# takes a lock for itself alone.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_HOST_BOUNDS": "1,1,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DUMP_FLAGS = (
    "--xla_jf_dump_llo_text=true",
    # Of some seventy files per kernel only the last ones are read.
    "--xla_jf_dump_llo_pass_label_regex=.*(final.*bundle|packed-bundles-post-ra).*",
)
_UTILIZATION = "final_hlo-static-per-bundle-utilization"
_PARTS = ("final_bundles", _UTILIZATION, "packed-bundles-post-ra")
_DUMPED = re.compile(r"\d+-(.+)-\d+-(" + "|".join(_PARTS) + r")\.txt")
_KERNEL = re.compile(
    r"%([\w.\-]+) = .*? custom-call\(.*custom_call_target=\"tpu_custom_call\""
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_dump_folder: Path | None = None


class CompilerUnavailable(RuntimeError):
    """The TPU compiler cannot be used in this process; the message says why."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The compiler's estimates for one program on one device; bytes and seconds.

    Attributes:
      device: its entry in `DEVICE_KINDS`.
      topology: what was asked for.
      num_devices: that the program runs on; all figures are of one of them.
      compile_seconds: of this machine, tracing included.
      argument_bytes: as laid out, padding included.
      output_bytes: of results, those in place of a donated argument included.
      aliased_bytes: of results that take the place of an argument.
      temporary_bytes: that the program needs besides.
      code_bytes: of the program itself.
      flops: as the compiler counts them; a Pallas kernel counts what its
        `cost_estimate` states, and the body of a loop counts once.
      bytes_accessed: likewise, operands and results of every instruction, wherever
        they lie; right for a kernel alone, many times too much for a whole program.
      traffic: what crosses between HBM and the core, see `traffic`.
      collectives: what the devices exchange.
      least_bytes: the least possible: arguments read once, results written once,
        or what the caller stated.
      optimal_seconds: the compiler's, where it gives one.
      estimated_cycles: the sum of its estimates of fusions (not of Pallas kernels).
      roofline: of `flops` and `least_bytes`.
      kernels: the Pallas kernels whose dumps were read; equal ones only once.
      instances: calls of Pallas kernels in the program, by name.
    """

    device: str
    topology: str
    num_devices: int
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    flops: float
    bytes_accessed: float
    traffic: Traffic
    collectives: tuple[Collective, ...]
    least_bytes: int
    optimal_seconds: float | None
    estimated_cycles: int
    roofline: Roofline
    kernels: tuple[KernelReport, ...]
    instances: dict[str, int]

    def kernel(self, name: str) -> KernelReport:
        """The kernel with this name (of its `pallas_call`).

        Raises:
          KeyError: no such kernel, or its dump was not asked for.
        """
        for kernel in self.kernels:
            if base_name(kernel.name) == name:
                return kernel
        held = ", ".join(kernel.name for kernel in self.kernels) or "none"
        raise KeyError(f"no kernel {name!r} in the report (it holds {held})")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with a line that says what it is."""
        return {"source": "compiler's estimates", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A compiled program and its report.

    Attributes:
      executable: `jax.stages.Compiled`; it can be inspected, not run.
      report: figures.
    """

    executable: Any
    report: Report

    @property
    def text(self) -> str:
        """The scheduled program (HLO), with layouts and memory spaces."""
        return self.executable.as_text()


def prepare(dump: bool = True) -> None:
    """Readies this process for the TPU compiler; `compile_for` calls it.

    Call it first thing in a program in which jax itself may load the TPU library.

    Args:
      dump: also ask for the machine programs of kernels, which the library only grants
        before it is loaded.

    Raises:
      CompilerUnavailable: libtpu is not installed, or already loaded without dumps.
    """
    global _dump_folder
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerUnavailable(
            "the TPU compiler is not installed; pip install 'jax[tpu]' brings it "
            "(Linux on x86-64)"
        )
    if not has_tpu():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
    if not dump or _dump_folder is not None:
        return
    if _is_loaded():
        raise CompilerUnavailable(
            "libtpu was loaded before its dumps were asked for; call "
            "pallas_kernels.aot.prepare() before jax starts, or set JAX_PLATFORMS=cpu"
        )
    _dump_folder = Path(tempfile.mkdtemp(prefix="tpu-dump-"))
    atexit.register(shutil.rmtree, _dump_folder, ignore_errors=True)
    flags = (f"--xla_jf_dump_to={_dump_folder}", *_DUMP_FLAGS)
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *flags]).strip()


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to build a mesh of; the same ones at every call.

    Raises:
      ValueError: an unknown topology.
      CompilerUnavailable: no libtpu.
    """
    known = device_kind(topology)
    prepare(dump=False)
    try:
        return _describe(topology).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the compiler refuses topology {topology!r} (such as {known.topology}): "
            f"{reason}"
        ) from None


@functools.cache
def _describe(topology: str):
    """Once: devices of two descriptions cannot share a program."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology)


def compile_for(
    topology: str,
    function: Callable,
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    kernels: bool = True,
    least_bytes: int | None = None,
) -> Compilation:
    """Compiles `function(*args)` for one device of a topology, or for a mesh of it.

    Args:
      topology: such as "v5e:2x2"; see `DEVICE_KINDS`.
      function: traceable; bind what is static beforehand.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s. Those without a sharding
        stand on the topology's first device; a `NamedSharding` over a mesh of
        `topology_devices(topology)` is kept.
      donate_argnums: arguments whose memory the results may take.
      kernels: read the machine programs of the Pallas kernels.
      least_bytes: of HBM traffic per device, for the roofline.

    Raises:
      ValueError: an unknown topology, or dumps of a form that is not known.
      CompilerUnavailable: no libtpu.
      jax.errors.JaxRuntimeError: what the compiler refuses.
    """
    kind = device_kind(topology)
    prepare(dump=kernels)
    devices = topology_devices(topology)
    lone = SingleDeviceSharding(devices[0])

    def described(leaf):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(leaf, jax.ShapeDtypeStruct) or sharding is None:
            sharding = lone
        return jax.ShapeDtypeStruct(
            jax.numpy.shape(leaf), leaf.dtype, sharding=sharding
        )

    _clear_dumps()
    begun = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=donate_argnums)
    placed = jax.tree.map(described, args)
    lowered = jitted.trace(*placed).lower()
    executable = lowered.compile()
    seconds = time.perf_counter() - begun
    if least_bytes is None:
        inputs = jax.tree.leaves(placed)
        results = jax.tree.leaves(lowered.out_info)
        least_bytes = _size(inputs, [leaf.sharding for leaf in inputs]) + _size(
            results, jax.tree.leaves(executable.output_shardings)
        )
    text = executable.as_text()
    names = _KERNEL.findall(text)
    read = _read_dumps(set(names), kind) if kernels else ()
    report = _report(kind, topology, executable, text, seconds, least_bytes)
    instances: dict[str, int] = {}
    for name in names:
        instances[base_name(name)] = instances.get(base_name(name), 0) + 1
    report = dataclasses.replace(report, kernels=read, instances=instances)
    return Compilation(executable, report)


def base_name(instruction: str) -> str:
    """The kernel's name, without the number that the compiler appends."""
    return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction)


def _report(
    kind: DeviceKind, topology: str, executable, text: str, seconds, least_bytes
) -> Report:
    memory = executable.memory_analysis()
    cost = executable.cost_analysis() or {}
    flops = cost.get("flops", 0.0)
    optimal = cost.get("optimal_seconds", 0.0)
    return Report(
        device=kind.name,
        topology=topology,
        num_devices=_num_devices(executable),
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=flops,
        bytes_accessed=_bytes_accessed(cost),
        traffic=hbm_traffic(text),
        collectives=collectives(text),
        least_bytes=least_bytes,
        # The compiler writes a negative number where it has none.
        optimal_seconds=optimal if optimal > 0 else None,
        estimated_cycles=sum(int(n) for n in _CYCLES.findall(text)),
        roofline=kind.roofline(flops, least_bytes),
        kernels=(),
        instances={},
    )


def _bytes_accessed(cost: dict[str, float]) -> float:
    if "bytes accessed" in cost:
        return cost["bytes accessed"]
    # A program of one Pallas call without an estimate: only its operands are listed.
    return sum(v for k, v in cost.items() if k.startswith("bytes accessed"))


def _num_devices(executable) -> int:
    shardings = jax.tree.leaves(executable.input_shardings)
    return max((len(s.device_set) for s in shardings), default=1)


def _size(leaves, shardings) -> int:
    """Bytes of one device's share of some arrays."""
    total = 0
    for leaf, sharding in zip(leaves, shardings, strict=True):
        shape = sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _is_loaded() -> bool:
    try:
        return "libtpu.so" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def _clear_dumps() -> None:
    for path in _dump_folder.iterdir() if _dump_folder else ():
        path.unlink(missing_ok=True)


def _read_dumps(names: set[str], kind: DeviceKind) -> tuple[KernelReport, ...]:
    dumps: dict[str, dict[str, Path]] = {}
    for path in sorted(_dump_folder.iterdir()):
        match = _DUMPED.fullmatch(path.name)
        if match and match[1] in names:
            dumps.setdefault(match[1], {})[match[2]] = path
    if names and not dumps:
        raise ValueError(
            "the compiler wrote no dump of its kernels; its flags are not the ones "
            "that pallas_kernels/aot knows"
        )
    reports = []
    for name, files in dumps.items():
        texts = [files[part].read_text() for part in _PARTS]
        reports.append(read_kernel(name, *texts, kind))
    _clear_dumps()
    return tuple(reports)
