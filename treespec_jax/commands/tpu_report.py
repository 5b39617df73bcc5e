"""What the TPU compiler says of the kernel and of a step; needs libtpu, and no TPU.

For example:

  tpu_report --topology=v6e:2x2 --target=llama-3-8b --kernel_only
  tpu_report --target=llama-3.2-1b --tree=regular:4x2x1 --output=runs/tpu
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags
from treespec_jax.measurement.study import carry_out


def define() -> SimpleNamespace:
    """Defines the flags."""
    return SimpleNamespace(
        topology=DEFINE_string("topology", "v5e:2x2", "v4:2x2x1, v6e:2x2, …"),
        target=DEFINE_string("target", "llama-3.2-1b", "a name (list_models)"),
        draft=DEFINE_string("draft", None, "a name; default: four narrow layers"),
        tree=DEFINE_string("tree", "regular:4x2x1", "none, chain:5, dynamic:15@5, …"),
        max_batch=DEFINE_integer("max_batch", 8, "texts decoded together"),
        max_len=DEFINE_integer("max_len", 2048, "tokens per text, all of them prefix"),
        page_size=flags.define_page_size(),
        dtype=DEFINE_string("dtype", "bfloat16", "of weights and cache, or float32"),
        devices=DEFINE_integer("devices", 1, "that share the weights of the step"),
        nodes=DEFINE_list("nodes", "1,16,64,128,256", "rows of the kernel's table"),
        kernel_only=DEFINE_bool("kernel_only", False, "leave out the step"),
        step_only=DEFINE_bool("step_only", False, "leave out the kernel"),
        output=flags.define_output(),
    )


def main(given: SimpleNamespace) -> None:
    """Runs the command."""
    # The compiler is all that is wanted of libtpu, so jax itself stays on the CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.measurement import compilation

    job = compilation.Job(
        topology=given.topology.value,
        model=given.target.value,
        draft=given.draft.value,
        tree=given.tree.value,
        batch=given.max_batch.value,
        context=given.max_len.value,
        page_size=given.page_size.value,
        dtype=given.dtype.value,
        devices=given.devices.value,
        nodes=flags.numbers("nodes", given.nodes.value),
    )
    kernel, step = not given.step_only.value, not given.kernel_only.value
    study = compilation.study(job, kernel=kernel, step=step)
    carry_out(study, given.output.value, must_write=False)
