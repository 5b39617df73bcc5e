"""What hardware this machine has, by its file system: cheap, and without jax."""

from __future__ import annotations

from pathlib import Path

_GOOGLE = "0x1ae0"
# PCI classes of Google's virtual disks and network cards.
_STORAGE_AND_NETWORK = ("0x01", "0x02")


def has_tpu(root: str = "/") -> bool:
    """Whether a TPU is attached: by its device files, or on the PCI bus.

    Args:
      root: where the file system stands.
    """
    base = Path(root)
    if any((base / "dev").glob("accel[0-9]*")):
        return True
    for device in (base / "sys/bus/pci/devices").glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == _GOOGLE and not kind.startswith(_STORAGE_AND_NETWORK):
            return True
    return False


def has_nvidia(root: str = "/") -> bool:
    """Whether the driver of an NVIDIA GPU is loaded."""
    return (Path(root) / "dev/nvidiactl").exists()
