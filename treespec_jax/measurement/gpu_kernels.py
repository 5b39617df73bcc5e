"""What XLA makes of a program for a GPU: its kernels, copies, loops and conditionals.

It compiles without a GPU too, where the CUDA plugin of jax is installed: the device is
then described to it. Matrix products are not tuned by measurement in that case; all
else is as on the device.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Of an H100 (the vendor's data sheet and programming guide).
_H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_block_optin": 227 << 10,
    "shared_memory_per_core": 228 << 10,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "memory_bandwidth": 3_352_000_000_000,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 80 << 30,
    "registers_per_core_limit": 1 << 16,
    "registers_per_block_limit": 1 << 16,
}
PLUGINS = "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"
# Instructions that launch nothing.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\(.*?\)|\S+) (?P<op>[\w\-]+)\("
)
_CALLED = re.compile(
    r"(?:condition|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class CompilerUnavailable(RuntimeError):
    """jax has no compiler for a GPU here."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What one run through a program launches; both sides of conditionals count.

    Attributes:
      products: matrix products.
      attention: kernels of this package.
      sorts: sorts and top-ks.
      copies: of whole arrays.
      fusions: all other kernels.
      conditionals: each of which reads its predicate on the host.
      loops: likewise.
    """

    products: int
    attention: int
    sorts: int
    copies: int
    fusions: int
    conditionals: int
    loops: int

    @property
    def total(self) -> int:
        """Kernels and copies."""
        return self.products + self.attention + self.sorts + self.copies + self.fusions


def device() -> jax.Device:
    """This machine's GPU, or the description of one to compile for.

    Raises:
      CompilerUnavailable: neither can be had.
    """
    if jax.default_backend() == "gpu":
        return jax.devices()[0]
    if not any(map(_is_installed, PLUGINS)):
        raise CompilerUnavailable(
            "jax has no CUDA plugin here; `pip install jax-cuda13-plugin "
            "jax-cuda13-pjrt` of jax's own version brings the compiler, and no GPU is "
            "needed"
        )
    lines = [f"  {name}: {value}" for name, value in _H100.items()]
    text = "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "  cuda_compute_capability { major: 9 }",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 7 }",
            'device_description_str: "NVIDIA H100 80GB HBM3"',
        ]
    )
    (found,) = topologies.get_topology_desc(
        "h100", "cuda", target_config=text, topology="1x1x1"
    ).devices
    return found


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compile_step(function, arguments: tuple, where: jax.Device) -> str:
    """The text of a compiled dispatch, whose second argument is donated.

    Args:
      function: of the dispatch.
      arguments: abstract ones, on no device.
      where: what to compile for.
    """
    sharding = SingleDeviceSharding(where)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    program = jax.jit(function, donate_argnums=1)
    return program.lower(*given).compile().as_text()


def kernels_of_loop(text: str) -> Kernels:
    """Of one turn of the first loop in the entry computation.

    Args:
      text: of a compiled module.

    Raises:
      ValueError: there is no loop.
    """
    entry, computations = _parse(text)
    for line in computations[entry]:
        if _operation(line) == "while":
            called = _called(line)
            return _total(called, computations)
    raise ValueError("the program has no loop")


def _parse(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry computation, and the instructions of all by name."""
    entry, found, current = "", {}, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found.setdefault(head.group(1), [])
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line.strip())
    return entry, found


def _operation(line: str) -> str:
    found = _INSTRUCTION.match(line)
    return found.group("op") if found else ""


def _called(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        names += [name.strip(" %") for name in group.split(",")]
    return names


def _total(names: list[str], computations: dict[str, list[str]]) -> Kernels:
    seen: collections.Counter[str] = collections.Counter()

    def visit(name: str) -> None:
        for line in computations.get(name, ()):
            kind = _kind(line)
            if kind is not None:
                seen[kind] += 1
            if _operation(line) in ("while", "conditional", "call"):
                for other in _called(line):
                    visit(other)

    for name in names:
        visit(name)
    fields = [field.name for field in dataclasses.fields(Kernels)]
    return Kernels(**{name: seen[name] for name in fields})


def _kind(line: str) -> str | None:
    """The field of `Kernels` that counts an instruction; None: none does."""
    operation = _operation(line)
    if not operation or operation in _FREE or operation == "call":
        return None
    simple = {"while": "loops", "conditional": "conditionals", "sort": "sorts"}
    if operation in simple:
        return simple[operation]
    if operation == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', line).group(1)
        if "TopK" in target or "sort" in target.lower():
            return "sorts"
        return "attention" if "triton" in target else "products"
    if operation == "fusion" and "__triton_nested_gemm_fusion" in line:
        return "products"
    if operation == "fusion" and "gemm_fusion" in line.split(" = ")[0]:
        return "products"
    if operation == "dot":
        return "products"
    return "copies" if operation.startswith("copy") else "fusions"
