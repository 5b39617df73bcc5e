"""Times the tree-attention kernel beside other attention and the memory's bandwidth.

By default one layer of Llama 3 8B: 8 texts with 8,192 tokens of prefix each, trees of
1 to 64 nodes. On a GPU, unattended:

  benchmark_attention --output=results

Small enough for a CPU:

  benchmark_attention --max_batch=2 --prefix=256 --nodes=1,8 --heads=4 --kv_heads=2 \\
      --head_dim=64 --dtype=float32 --copy_mib=64 --matrix=512 --calls=2
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from absl.flags import DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.commands import flags, runtime
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables
from treespec_jax.measurement.output import say
from treespec_jax.measurement.study import Study, carry_out


def define() -> SimpleNamespace:
    """Defines the flags."""
    return SimpleNamespace(
        max_batch=DEFINE_integer("max_batch", 8, "texts decoded together"),
        prefix=DEFINE_integer("prefix", 8192, "tokens of prefix of each text"),
        nodes=DEFINE_list("nodes", ["1", "16", "32", "64"], "sizes of trees"),
        heads=DEFINE_integer("heads", 32, "query heads"),
        kv_heads=DEFINE_integer("kv_heads", 8, "key/value heads"),
        head_dim=DEFINE_integer("head_dim", 128, "width of a head"),
        page_size=flags.define_page_size(),
        dtype=DEFINE_string("dtype", "bfloat16", "bfloat16, float16 or float32"),
        implementation=DEFINE_string(
            "implementation", None, "of tree attention; default: by platform"
        ),
        rounds=DEFINE_integer("rounds", 7, "measurements of each, in turn"),
        calls=DEFINE_integer("calls", 20, "calls per measurement"),
        copy_mib=DEFINE_integer("copy_mib", 1024, "MiB whose copy gives the bandwidth"),
        matrix=DEFINE_integer("matrix", 8192, "rows of the matrices of the product"),
        seed=DEFINE_integer("seed", 0, "of the random inputs"),
        output=flags.define_output(),
        compilation_cache=flags.define_compilation_cache(),
    )


def main(given: SimpleNamespace) -> None:
    """Runs the command."""
    nodes = flags.numbers("nodes", given.nodes.value)
    runtime.set_up(given.compilation_cache.value)
    from pallas_kernels.tree_attention import benchmark

    try:
        settings = benchmark.Settings(
            slots=given.max_batch.value,
            prefix=given.prefix.value,
            nodes=nodes,
            heads=given.heads.value,
            kv_heads=given.kv_heads.value,
            head_dim=given.head_dim.value,
            page=given.page_size.value,
            dtype=given.dtype.value,
            implementation=given.implementation.value,
            rounds=given.rounds.value,
            calls=given.calls.value,
            copy_bytes=given.copy_mib.value << 20,
            matrix=given.matrix.value,
            seed=given.seed.value,
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def measure() -> dict[str, Any]:
        from treespec_jax.measurement.versions import versions

        try:
            report = benchmark.run(settings, say)
        except ValueError as error:
            if settings.implementation is None:
                raise
            raise UserError(f"--implementation: {error}") from None
        return {"versions": versions(), **report}

    def table(report: dict[str, Any]) -> str:
        rows = list(benchmark.rows(report))
        return f"{summary(report)}\n\n{tables.markdown(rows)}"

    carry_out(Study(measure, table), given.output.value, must_write=False)


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
