"""What the TPU compiler says of the kernel and of a step; needs libtpu, and no TPU.

tpu_report.py --topology=v6e:2x2 --model=llama-3-8b --kernel_only
tpu_report.py --model=llama-3.2-1b --tree=regular:4x2x1 --output=runs/tpu
"""

from absl import flags

from treespec_jax import cli

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "v4:2x2x1, v6e:2x2, …")
_MODEL = flags.DEFINE_string("model", "llama-3.2-1b", "target (list_models.py)")
_DRAFT = flags.DEFINE_string("draft", None, "drafter; else four narrow layers")
_TREE = flags.DEFINE_string("tree", "regular:4x2x1", "none, chain:5, dynamic:15@5, …")
_BATCH = flags.DEFINE_integer("batch", 8, "slots")
_CONTEXT = flags.DEFINE_integer("context", 2048, "rows of prefix per slot")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 128, "cache rows per page")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "of weights and cache, or float32")
_DEVICES = flags.DEFINE_integer("devices", 1, "that share the weights of the step")
_NODES = flags.DEFINE_list("nodes", "1,16,64,128,256", "rows of the kernel's table")
_KERNEL_ONLY = flags.DEFINE_bool("kernel_only", False, "leave out the step")
_STEP_ONLY = flags.DEFINE_bool("step_only", False, "leave out the kernel")
_OUTPUT = flags.DEFINE_string("output", "", "folder for report.json and report.md")


def main(_):
    # The compiler is all that is wanted of libtpu, so jax itself stays on the CPU.
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.errors import UserError
    from treespec_jax.experiments import tpu_report

    if not all(n.isdecimal() for n in _NODES.value):
        raise UserError(f"--nodes={','.join(_NODES.value)} must be whole numbers")
    job = tpu_report.Job(
        topology=_TOPOLOGY.value,
        model=_MODEL.value,
        draft=_DRAFT.value,
        tree=_TREE.value,
        batch=_BATCH.value,
        context=_CONTEXT.value,
        page_size=_PAGE_SIZE.value,
        dtype=_DTYPE.value,
        devices=_DEVICES.value,
        nodes=tuple(int(n) for n in _NODES.value),
    )
    kernel, step = not _STEP_ONLY.value, not _KERNEL_ONLY.value
    tpu_report.run(job, kernel=kernel, step=step, folder=_OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
