"""Chooses the TPU kernel's block sizes, by the compiler's figures or by time.

For example:

  tune_kernel --topology=v5e:2x2,v6e:2x2 --work=runs/tune          (no TPU needed)
  tune_kernel --measure --work=runs/tune --save                    (on a TPU)

It goes on where it stopped: trials are kept in --work. With --save the sizes that beat
the default replace those of the same device kinds and classes in
pallas_kernels/tree_attention/tpu_sizes.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags


def define() -> SimpleNamespace:
    """Defines the flags."""
    return SimpleNamespace(
        topology=DEFINE_list("topology", "v5e:2x2", "to rank for, without a device"),
        measure=DEFINE_bool("measure", False, "rank by time on this machine's TPU"),
        rows=DEFINE_list("rows", None, "classes: query rows per key/value head"),
        kv_heads=_positive("kv_heads", 8, "key/value heads"),
        group=_positive("group", 4, "query heads per key/value head"),
        head_dim=_positive("head_dim", 128, "width of a head"),
        page_size=flags.define_page_size(),
        prefix=_positive("prefix", 2048, "tokens of prefix of each text"),
        max_batch=_positive("max_batch", 8, "texts decoded together"),
        work=DEFINE_string("work", "runs/tune", "folder of finished trials"),
        save=DEFINE_bool("save", False, "write the chosen sizes to the data file"),
    )


def _positive(name: str, default: int, words: str):
    return DEFINE_integer(name, default, words, lower_bound=1)


def main(given: SimpleNamespace) -> None:
    """Runs the command."""
    if not given.measure.value:  # the compiler is all that is wanted of libtpu
        os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.measurement import kernel_search

    call = kernel_search.Shape(
        slots=given.max_batch.value,
        prefix=given.prefix.value,
        kv_heads=given.kv_heads.value,
        group=given.group.value,
        head_dim=given.head_dim.value,
        page=given.page_size.value,
    )
    kernel_search.run(
        call,
        topologies=() if given.measure.value else tuple(given.topology.value),
        rows=kernel_search.classes(given.rows.value),
        work=Path(given.work.value).expanduser(),
        write=given.save.value,
    )
