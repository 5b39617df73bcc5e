"""Times the tree-attention kernel beside other attention and the memory's bandwidth.

By default one layer of Llama 3 8B: 8 texts with 8,192 tokens of prefix each, trees of
1 to 64 nodes. On a GPU, unattended:

  benchmark_attention.py --output=results

Small enough for a CPU:

  benchmark_attention.py --slots=2 --prefix=256 --nodes=1,8 --heads=4 --kv_heads=2 \\
      --head_dim=64 --dtype=float32 --copy_mib=64 --matrix=512 --calls=2
"""

import json
import sys

from absl import flags

from treespec_jax import cli
from treespec_jax.errors import UserError

_SLOTS = flags.DEFINE_integer("slots", 8, "texts")
_PREFIX = flags.DEFINE_integer("prefix", 8192, "tokens of prefix of each text")
_NODES = flags.DEFINE_list("nodes", ["1", "16", "32", "64"], "sizes of trees")
_HEADS = flags.DEFINE_integer("heads", 32, "query heads")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "key/value heads")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 128, "width of a head")
_PAGE = flags.DEFINE_integer("page", 128, "tokens of a page of the cache")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "bfloat16, float16 or float32")
_IMPLEMENTATION = flags.DEFINE_string(
    "implementation", None, "of tree attention; else by platform"
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "samples of each, in interleaved rounds")
_CALLS = flags.DEFINE_integer("calls", 20, "calls per sample")
_COPY = flags.DEFINE_integer("copy_mib", 1024, "MiB whose copy gives the bandwidth")
_MATRIX = flags.DEFINE_integer("matrix", 8192, "rows of the matrices of the product")
_SEED = flags.DEFINE_integer("seed", 0, "of the random inputs")
_OUTPUT = flags.DEFINE_string("output", "", "folder to write to, if any")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def nodes() -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in _NODES.value)
    except ValueError:
        raise UserError(
            f"--nodes={','.join(_NODES.value)}: give whole numbers, as in 1,16,64"
        ) from None


def main(_) -> None:
    from treespec_jax.experiments import output, runtime, table

    runtime.set_up(_CACHE.value)
    from pallas_kernels.tree_attention import benchmark

    try:
        settings = benchmark.Settings(
            slots=_SLOTS.value,
            prefix=_PREFIX.value,
            nodes=nodes(),
            heads=_HEADS.value,
            kv_heads=_KV_HEADS.value,
            head_dim=_HEAD_DIM.value,
            page=_PAGE.value,
            dtype=_DTYPE.value,
            implementation=_IMPLEMENTATION.value,
            rounds=_ROUNDS.value,
            calls=_CALLS.value,
            copy_bytes=_COPY.value << 20,
            matrix=_MATRIX.value,
            seed=_SEED.value,
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def measure() -> tuple[dict, str]:
        try:
            report = benchmark.run(settings, lambda line: print(line, file=sys.stderr))
        except ValueError as error:
            if settings.implementation is None:
                raise
            raise UserError(f"--implementation: {error}") from None
        report = {"versions": runtime.versions(), **report}
        text = table.markdown(list(benchmark.rows(report)))
        text = f"{summary(report)}\n\n{text}"
        print(text)
        return report, text

    if not _OUTPUT.value:
        measure()
        return
    with output.folder(_OUTPUT.value) as folder:
        report, text = measure()
        (folder / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "attention.md").write_text(text + "\n")


def summary(report: dict) -> str:
    v, s, top = report["versions"], report["settings"], report["ceilings"]
    return (
        f"{v['device_kind']}, jax {v['jax']}, {s['dtype']}: {s['slots']} texts × "
        f"{s['prefix']} tokens, {s['heads']} heads of {s['head_dim']}, "
        f"{s['kv_heads']} of keys and values, pages of {s['page']}; device copy "
        f"{top['copy_bytes_per_s'] / 1e9:.0f} GB/s, matrix product "
        f"{top['matmul_flop_per_s'] / 1e12:.1f} TFLOP/s. Medians of {s['rounds']} "
        "interleaved rounds."
    )


if __name__ == "__main__":
    cli.run(main)
