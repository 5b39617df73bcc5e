"""Which part of a parameter lies on which device: logical axes → mesh axes.

Contract:

- A parameter names its axes once, where it is declared (`logical_axes`: "vocab",
  "embed", "kv_heads", "heads", "mlp", …). A mesh names the axes of a grid of devices
  ("tensor", …). `Rules` say which logical axis is cut along which mesh axis; nothing
  else decides where a weight lies, and no model code mentions a mesh.
- An axis is cut into equal parts or not at all. One that the mesh does not divide, or
  whose mesh axis another axis of the same parameter already takes, is replicated, and
  `partition` says why. That is always correct, and costs memory.
- A rule that names an axis the mesh does not have is a mistake, and an error.
- Shardings change where numbers lie, never what they are: the program that runs is the
  one that runs on a single device, partitioned by the compiler.

The default rules are tensor parallelism (Shoeybi et al., 1909.08053): heads of
attention, width of the MLP and rows of the vocabulary over the mesh axis "tensor".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from treespec_jax.errors import UserError

TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axis; axes that are not named are replicated.

    Attributes:
      axes: pairs of names; a mapping is taken too. None as the mesh axis replicates.

    Raises:
      UserError: a logical axis is named twice, or something is no name.
    """

    axes: tuple[tuple[str, str | None], ...] = (
        ("kv_heads", TENSOR),
        ("heads", TENSOR),
        ("mlp", TENSOR),
        ("vocab", TENSOR),
    )

    def __post_init__(self):
        given = self.axes.items() if isinstance(self.axes, Mapping) else self.axes
        pairs = tuple((logical, axis) for logical, axis in given)
        for logical, axis in pairs:
            if not isinstance(logical, str) or not isinstance(axis, str | None):
                raise UserError(
                    f"sharding rule {logical!r}: {axis!r} must go from the name of a "
                    "parameter's axis to that of a mesh axis, or None"
                )
        names = [logical for logical, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"sharding rules name axis {name!r} twice; keep one")
        object.__setattr__(self, "axes", pairs)

    def mesh_axis(self, logical: str) -> str | None:
        """The mesh axis along which `logical` is cut, or None."""
        return dict(self.axes).get(logical)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a cache lies: what the code that reads and writes it must know.

    Attributes:
      mesh: of the devices that share the model; None: one device.
      axis: of the mesh, cuts the key/value heads; None: each device holds all of them.
      device_kind: `jax.Device.device_kind`; None: not known.
    """

    mesh: Mesh | None = None
    axis: str | None = None
    device_kind: str | None = None

    def of_heads(self, kv_heads: int) -> Placement:
        """The same for a model with so many key/value heads.

        Heads that the axis does not divide stay whole: every device then holds that
        model's cache and does all of its attention.
        """
        if self.axis is None or kv_heads % self.mesh.shape[self.axis] == 0:
            return self
        return dataclasses.replace(self, axis=None)

    @property
    def heads_spec(self) -> PartitionSpec:
        """Of pages, rows and scales, whose second axis are the heads."""
        return PartitionSpec(None, self.axis)


def make_mesh(
    axes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A grid of devices.

    Args:
      axes: "tensor:4", "data:2,tensor:4" or a mapping of the same.
      devices: to fill it with, in order; None: the first ones there are.

    Raises:
      UserError: it does not parse, asks for more devices than there are, or has none
        of some process.
    """
    sizes = _parse(axes) if isinstance(axes, str) else dict(axes)
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(
                f"mesh axis {name!r} must have a whole number >= 1 of devices, got "
                f"{size!r}"
            )
    if not sizes:
        raise UserError('a mesh needs an axis; give one such as "tensor:4"')
    found = jax.devices() if devices is None else list(devices)
    count = math.prod(sizes.values())
    if count > len(found):
        raise UserError(
            f"mesh {_text(sizes)} asks for {count} devices, there are {len(found)}; "
            "lower it"
        )
    taken = {device.process_index for device in found[:count]}
    idle = set(range(jax.process_count())) - taken if devices is None else set()
    if idle:
        raise UserError(
            f"mesh {_text(sizes)} leaves process {min(idle)} without a device; raise "
            f"it ({len(found)} are all devices), or start fewer processes"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        # The compiler places what lies between the parameters.
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=found[:count],
    )


def partition(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Rules = Rules(),
) -> tuple[PartitionSpec, tuple[str, ...]]:
    """How an array with logical `axes` and `shape` is cut.

    Returns:
      The spec, and a reason for every axis that a rule names and that stays whole.

    Raises:
      UserError: a rule for one of the axes names no axis of the mesh, or there are not
        as many axes as dimensions.
    """
    if len(axes) != len(shape):
        raise UserError(
            f"logical axes {tuple(axes)} do not describe an array of shape "
            f"{list(shape)}"
        )
    spec: list[str | None] = []
    reasons = []
    for logical, size in zip(axes, shape, strict=True):
        axis = rules.mesh_axis(logical)
        if axis is not None and axis not in mesh.shape:
            raise UserError(
                f"the sharding rule for {logical!r} names mesh axis {axis!r}, which "
                f"mesh {_text(mesh.shape)} does not have; change the rule or the mesh"
            )
        if axis is not None and axis in spec:
            taken = axes[spec.index(axis)]
            reasons.append(f"{logical}: {axis} already cuts {taken}")
            axis = None
        elif axis is not None and size % mesh.shape[axis]:
            reasons.append(
                f"{logical}: {axis}:{mesh.shape[axis]} does not divide {size}"
            )
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec), tuple(reasons)


def sharding_of(
    axes: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Rules = Rules(),
) -> NamedSharding:
    """The sharding of an array with logical `axes` and `shape`; see `partition`."""
    return NamedSharding(mesh, partition(axes, shape, mesh, rules)[0])


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if not name.isidentifier() or not size.isdecimal():
            raise UserError(
                f'mesh {text!r} must read like "tensor:4" or "data:2,tensor:4"'
            )
        if name in sizes:
            raise UserError(f"mesh {text!r} names axis {name!r} twice; keep one")
        sizes[name] = int(size)
    return sizes


def _text(sizes: Mapping[str, int]) -> str:
    """{"data": 2, "tensor": 4} -> "data:2,tensor:4"."""
    return ",".join(f"{name}:{size}" for name, size in sizes.items())
