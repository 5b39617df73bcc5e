"""Peak rates of TPU generations, as data; one entry is what jax calls one device."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One jax device: a chip, or one core of it on v4 and tpu7x.

    Attributes:
      name: what topologies call it.
      kind: `jax.Device.device_kind`.
      chip: name in `pltpu.ChipVersion`.
      topology: the smallest one the compiler takes with more than one chip.
      bf16_flops: peak per second.
      int8_ops: peak per second; the bf16 rate where int8 is not native.
      bandwidth: of HBM, bytes per second.
      hbm_bytes: capacity.
      clock: of the core, cycles per second, one bundle each: from the peak rate and
        the size of the MXUs. On v6e and tpu7x that takes two rows per cycle and MXU,
        which is inferred from the compiler's cycle estimates of large products.
      granule: bytes of the unit in which the compiler states the size of a copy.
      delay_slots: bundles that run after a branch, taken or not.
    """

    name: str
    kind: str
    chip: str
    topology: str
    bf16_flops: float
    int8_ops: float
    bandwidth: float
    hbm_bytes: int
    clock: float
    granule: int
    delay_slots: int

    def stream_cycles(self, size: int) -> float:
        """Cycles in which `size` bytes come from HBM at the peak bandwidth."""
        return size / self.bandwidth * self.clock

    def roofline(self, flops: float, size: float, int8: bool = False) -> Roofline:
        """The least time of `flops` operations and `size` bytes of HBM traffic."""
        peak = self.int8_ops if int8 else self.bf16_flops
        return Roofline(memory=size / self.bandwidth, compute=flops / peak)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds by bandwidth and by peak rate; the larger one bounds."""

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute)


_T, _G, _GIB = 1e12, 1e9, 1 << 30

DEVICE_KINDS = {
    entry.name: entry
    for entry in [
        DeviceKind(
            "v4",
            "TPU v4",
            "TPU_V4",
            "v4:2x2x1",
            137.5 * _T,
            137.5 * _T,
            614 * _G,
            16 * _GIB,
            1.05 * _G,
            granule=512,
            delay_slots=1,
        ),
        DeviceKind(
            "v5e",
            "TPU v5 lite",
            "TPU_V5E",
            "v5e:2x2",
            197 * _T,
            394 * _T,
            819 * _G,
            16 * _GIB,
            1.5 * _G,
            granule=32,
            delay_slots=4,
        ),
        DeviceKind(
            "v5p",
            "TPU v5",
            "TPU_V5P",
            "v5p:2x2x1",
            459 * _T,
            918 * _T,
            2765 * _G,
            95 * _GIB,
            1.75 * _G,
            granule=32,
            delay_slots=4,
        ),
        DeviceKind(
            "v6e",
            "TPU v6 lite",
            "TPU_V6E",
            "v6e:2x2",
            918 * _T,
            1836 * _T,
            1638 * _G,
            32 * _GIB,
            1.75 * _G,
            granule=32,
            delay_slots=4,
        ),
        DeviceKind(
            "tpu7x",
            "TPU7x",
            "TPU_7X",
            "tpu7x:2x2x1",
            1153.5 * _T,
            1153.5 * _T,
            3690 * _G,
            96 * _GIB,
            2.2 * _G,
            granule=32,
            delay_slots=6,
        ),
    ]
}


def device_kind(topology: str) -> DeviceKind:
    """The entry of a topology ("v5e:2x2") or of a `jax.Device.device_kind`.

    Raises:
      ValueError: a name that is not in the table.
    """
    name = topology.split(":")[0]
    for entry in DEVICE_KINDS.values():
        if name in (entry.name, entry.kind):
            return entry
    known = ", ".join(entry.topology for entry in DEVICE_KINDS.values())
    raise ValueError(f"unknown TPU topology {topology!r}; choose from {known}")
