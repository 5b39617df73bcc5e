"""Times the tree-attention kernel beside other attention and the memory's bandwidth.

By default one layer of Llama 3 8B: 8 texts with 8,192 tokens of prefix each, trees of
1 to 64 nodes. On a GPU, unattended:

  benchmark_attention --output=results

Small enough for a CPU:

  benchmark_attention --max_batch=2 --prefix=256 --nodes=1,8 --heads=4 --kv_heads=2 \\
      --head_dim=64 --dtype=float32 --copy_mib=64 --matrix=512 --calls=2
"""

from __future__ import annotations

from typing import Any

from absl.flags import DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags, runtime
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables
from treespec_jax.measurement.output import Study, say

# Settings that have a flag of the same name.
_MODEL = ("prefix", "heads", "kv_heads", "head_dim", "dtype", "implementation")
_TIMING = ("rounds", "calls", "matrix", "seed")


def define() -> None:
    DEFINE_list("nodes", ["1", "16", "32", "64"], "sizes of trees")
    DEFINE_integer("heads", 32, "query heads")
    DEFINE_string("dtype", "bfloat16", "bfloat16, float16 or float32")
    words = "what to time: tree_attention, xla gathered, nn xla, nn cudnn; default: all"
    DEFINE_list("methods", None, words)
    DEFINE_string("implementation", None, "of tree attention; default: by platform")
    DEFINE_integer("rounds", 7, "measurements of each, in turn")
    DEFINE_integer("calls", 20, "calls per measurement")
    DEFINE_integer("copy_mib", 1024, "MiB whose copy gives the bandwidth")
    DEFINE_integer("matrix", 8192, "rows of the matrices of the product")
    DEFINE_integer("seed", 0, "of the random inputs")
    flags.define("max_batch", "page_size", "kv_heads", "head_dim", prefix=8192)
    flags.define("output", "compilation_cache")


def main(given) -> None:
    runtime.set_up(given.compilation_cache)
    from pallas_kernels.tree_attention import benchmark

    methods = {"methods": tuple(given.methods)} if given.methods else {}
    try:
        settings = benchmark.Settings(
            slots=given.max_batch,
            nodes=flags.numbers("nodes", given.nodes),
            page=given.page_size,
            copy_bytes=given.copy_mib << 20,
            **methods,
            **{name: given[name].value for name in (*_MODEL, *_TIMING)},
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def measure() -> dict[str, Any]:
        from treespec_jax.measurement.machine import versions

        try:
            report = benchmark.run(settings, say)
        except ValueError as error:
            if settings.implementation is None:
                raise
            raise UserError(f"--implementation: {error}") from None
        return {"versions": versions(), **report}

    def table(report: dict[str, Any]) -> str:
        return f"{summary(report)}\n\n{tables.markdown(list(benchmark.rows(report)))}"

    Study(measure, table).carry_out(given.output, must_write=False)


def summary(report: dict[str, Any]) -> str:
    """What was measured, on what, and the ceilings."""
    v, s, top = report["versions"], report["settings"], report["ceilings"]
    return (
        f"{v['device_kind']}, jax {v['jax']}, {s['dtype']}: {s['slots']} texts × "
        f"{s['prefix']} tokens, {s['heads']} heads of {s['head_dim']}, "
        f"{s['kv_heads']} of keys and values, pages of {s['page']}; device copy "
        f"{top['copy_bytes_per_s'] / 1e9:.0f} GB/s, matrix product "
        f"{top['matmul_flop_per_s'] / 1e12:.1f} TFLOP/s. Medians of {s['rounds']} "
        "interleaved rounds."
    )
