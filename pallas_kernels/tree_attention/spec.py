"""The settings of one call."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes
from pallas_kernels.tree_attention.sizes import BlockSizes

# Platforms by the name of their kernel.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}
# Those in XLA, which run anywhere.
PLAIN = ("reference", "bitwise")
IMPLEMENTATIONS = (*PLAIN, *PLATFORMS)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """How `tree_attention` computes; hashable, so that jit can take it as static.

    Attributes:
      scale: multiplies the scores.
      window: a row sees the `window` newest positions only, itself included; in the
        tree, positions go by depth. None: all positions.
      soft_cap: scores become cap · tanh(score / cap).
      implementation: a name of `IMPLEMENTATIONS`, or None to choose by the platform
        that the program is compiled for; the reference where the kernel cannot take
        the operands. "bitwise" takes int8 pages only, and rounds the tree's rows too:
        its results have the same bits whatever is beside a row.
      device_kind: `jax.Device.device_kind` to choose block sizes for; None: sizes that
        fit every kind.
      block_sizes: instead of the chosen ones; their type says for which kernel.
      interpret: True or `pltpu.InterpretParams`: runs a named kernel anywhere, slowly.
      mesh: of the devices that share the call. No compiler cuts a kernel up by itself:
        each device runs one on its own heads, and nothing is exchanged.
      heads_axis: axis of `mesh` that cuts the K heads, and with them the N, of all
        arrays; None: every device does all of them.

    Raises:
      ValueError: a setting that no call can have.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    implementation: str | None = None
    device_kind: str | None = None
    block_sizes: BlockSizes | GpuBlockSizes | None = None
    interpret: bool | object = False
    mesh: Mesh | None = None
    heads_axis: str | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: want at least 1, or None")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap}: want a positive cap, or None")
        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"tree_attention has no implementation {self.implementation!r}; choose "
                f"from {', '.join(IMPLEMENTATIONS)}"
            )
        if self.interpret and self.implementation not in PLATFORMS:
            raise ValueError(
                f"interpret needs a kernel's name, not {self.implementation!r}"
            )
        axes = () if self.mesh is None else self.mesh.axis_names
        if self.heads_axis not in (None, *axes):
            raise ValueError(
                f"heads_axis={self.heads_axis!r} is not an axis of the mesh, which has "
                f"{', '.join(axes) or 'none'}"
            )
