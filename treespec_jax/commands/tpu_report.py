"""What the TPU compiler says of the kernel and of a step; needs libtpu, and no TPU.

For example:

  tpu_report --topology=v6e:2x2 --target=llama-3-8b --kernel_only
  tpu_report --target=llama-3.2-1b --tree=regular:4x2x1 --output=runs/tpu
  tpu_report --topology=v5e:2x4 --target=llama-3-8b --mesh=tensor:8 --step_only
"""

from __future__ import annotations

import os

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import Study


def define() -> None:
    DEFINE_string("topology", "v5e:2x2", "v4:2x2x1, v6e:2x2, …")
    DEFINE_string("target", "llama-3.2-1b", "a name (list_models)")
    DEFINE_string("draft", None, "a name; default: four narrow layers")
    DEFINE_string("tree", "regular:4x2x1", "none, chain:5, dynamic:15@5, …")
    DEFINE_integer("max_len", 2048, "tokens per text, all of them prefix")
    DEFINE_string("dtype", "bfloat16", "of activations and cache, or float32")
    DEFINE_string(
        "weights", None, "type of weights, int8 for example; default: --dtype"
    )
    words = "products with int8 weights round activations to int8 too"
    DEFINE_bool("round_rows", False, words)
    DEFINE_string("mesh", "tensor:1", "devices that share the weights of the step")
    DEFINE_integer("layers", 0, "of the target, the first so many; 0: all")
    DEFINE_list("nodes", "1,16,64,128,256", "rows of the kernel's table")
    DEFINE_bool("kernel_only", False, "leave out the step")
    DEFINE_bool("step_only", False, "leave out the kernel")
    flags.define("max_batch", "page_size", "output")


def main(given) -> None:
    # The compiler is all that is wanted of libtpu, so jax itself stays on the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.measurement import compilation

    same = (
        "topology",
        "draft",
        "tree",
        "page_size",
        "dtype",
        "weights",
        "round_rows",
        "layers",
    )
    job = compilation.Job(
        model=given.target,
        batch=given.max_batch,
        context=given.max_len,
        nodes=flags.numbers("nodes", given.nodes),
        devices=_devices(given.mesh),
        **{name: given[name].value for name in same},
    )
    kernel, step = not given.step_only, not given.kernel_only
    measure, table = compilation.study(job, kernel, step)
    Study(measure, table).carry_out(given.output, must_write=False)


def _devices(mesh: str) -> int:
    """How many devices a mesh of one axis has; the step is cut along that alone."""
    axis, _, count = mesh.partition(":")
    if axis != "tensor" or not count.isdecimal():
        raise UserError(f"--mesh={mesh}: give tensor:N, tensor:4 for example")
    return int(count)
