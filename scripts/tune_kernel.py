"""Chooses the TPU kernel's block sizes, by the compiler's figures or by time.

tune_kernel.py --topology=v5e:2x2,v6e:2x2 --work=runs/tune          (no TPU needed)
tune_kernel.py --measure --work=runs/tune --save                    (on a TPU)

It goes on where it stopped: trials are kept in --work. With --save the sizes that beat
the default replace those of the same device kinds and classes in
pallas_kernels/tree_attention/tpu_sizes.json.
"""

from pathlib import Path

from absl import flags

from treespec_jax import cli

_TOPOLOGY = flags.DEFINE_list("topology", "v5e:2x2", "to rank for, without a device")
_MEASURE = flags.DEFINE_bool("measure", False, "rank by time on this machine's TPU")
_ROWS = flags.DEFINE_list("rows", None, "classes: query rows per key/value head")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "K", lower_bound=1)
_GROUP = flags.DEFINE_integer("group", 4, "G", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "H", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 128, "cache rows per page")
_PREFIX = flags.DEFINE_integer("prefix", 2048, "rows of prefix per slot", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 8, "texts", lower_bound=1)
_WORK = flags.DEFINE_string("work", "runs/tune", "folder of finished trials")
_SAVE = flags.DEFINE_bool("save", False, "write the chosen sizes to the data file")


def main(_):
    import os

    if not _MEASURE.value:  # the compiler is all that is wanted of libtpu
        os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.experiments import tune_kernel

    tune_kernel.run(
        tune_kernel.shape(
            slots=_SLOTS.value,
            prefix=_PREFIX.value,
            kv_heads=_KV_HEADS.value,
            group=_GROUP.value,
            head_dim=_HEAD_DIM.value,
            page=_PAGE_SIZE.value,
        ),
        topologies=() if _MEASURE.value else tuple(_TOPOLOGY.value),
        rows=tune_kernel.classes(_ROWS.value),
        work=Path(_WORK.value).expanduser(),
        write=_SAVE.value,
    )


if __name__ == "__main__":
    cli.run(main)
