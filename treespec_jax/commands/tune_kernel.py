"""Chooses the TPU kernel's block sizes, by the compiler's figures or by time.

For example:

  tune_kernel --topology=v5e:2x2,v6e:2x2 --work=runs/tune          (no TPU needed)
  tune_kernel --measure --work=runs/tune --save                    (on a TPU)

The same command goes on where it stopped: --work holds the finished trials. With
--save the sizes that beat the default replace those of the same device kinds and
classes in pallas_kernels/tree_attention/tpu_sizes.json.
"""

from __future__ import annotations

import os
from pathlib import Path

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags


def define() -> None:
    DEFINE_list("topology", "v5e:2x2", "to rank for, without a device")
    DEFINE_bool("measure", False, "rank by time on this machine's TPU")
    DEFINE_list("rows", None, "classes: query rows per key/value head")
    DEFINE_integer("group", 4, "query heads per key/value head", lower_bound=1)
    flags.define("max_batch", "prefix", "page_size", "kv_heads", "head_dim")
    DEFINE_string("work", "runs/tune", "folder of finished trials")
    DEFINE_bool("save", False, "write the chosen sizes to the data file")


def main(given) -> None:
    if not given.measure:  # the compiler is all that is wanted of libtpu
        os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.measurement import kernel_search

    same = ("prefix", "kv_heads", "group", "head_dim")
    sizes = {name: given[name].value for name in same}
    call = kernel_search.Shape(slots=given.max_batch, page=given.page_size, **sizes)
    kernel_search.run(
        call,
        topologies=() if given.measure else tuple(given.topology),
        rows=kernel_search.classes(given.rows),
        work=Path(given.work).expanduser(),
        write=given.save,
    )
