"""Loops, conditionals, sorts and kernels of a step for a GPU; no GPU is needed.

For example:

  gpu_report --target=llama-3.2-1b --tree=dynamic:15@5
  gpu_report --lowered_only --output=runs/gpu

Kernels after fusion need the CUDA plugin of jax, without a GPU too, and minutes.
"""

from __future__ import annotations

import os

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_string

from treespec_jax.commands import flags
from treespec_jax.measurement.output import Study


def define() -> None:
    DEFINE_string("target", "llama-3.2-1b", "a name (list_models)")
    DEFINE_string("draft", None, "a name; default: four narrow layers")
    DEFINE_string("tree", "dynamic:15@5", "none, chain:5, regular:4x2x1, …")
    DEFINE_string("dtype", "bfloat16", "of activations and cache, or float32")
    DEFINE_string(
        "weights", None, "type of weights, int8 for example; default: --dtype"
    )
    words = "products with int8 weights round activations to int8 too"
    DEFINE_bool("round_rows", False, words)
    DEFINE_bool("lowered_only", False, "compile nothing")
    DEFINE_integer("max_len", 2048, "tokens per text")
    flags.define("page_size", "output", max_batch=1)


def main(given) -> None:
    if given.lowered_only:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from treespec_jax.measurement import compilation, gpu_programs

    same = ("draft", "tree", "page_size", "dtype", "weights", "round_rows")
    job = compilation.Job(
        model=given.target,
        batch=given.max_batch,
        context=given.max_len,
        **{name: given[name].value for name in same},
    )
    measure, table = gpu_programs.study(job, not given.lowered_only)
    Study(measure, table).carry_out(given.output, must_write=False)
