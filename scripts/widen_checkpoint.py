"""Makes a checkpoint larger without changing its function.

Reads what convert_checkpoint.py reads, and writes a folder of the same kind. The larger
model gives the same logits (up to rounding) at the cost of its size:

  widen_checkpoint.py --input=stories260K.bin --tokenizer=tok512.bin --output=wide \\
      --embed_dim=768 --mlp_dim=2048 --num_layers=12 --vocab_size=32000

Sizes that are not given stay. treespec_jax/checkpoints/widening.py has the formulas.
"""

import os
import sys

from absl import flags

from treespec_jax import cli

_INPUT = flags.DEFINE_string("input", None, "checkpoint to read", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer file; default: the one found with the input"
)
_LIKE = flags.DEFINE_string(
    "like", None, "take all sizes from this model (list_models.py names them)"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the random weights", lower_bound=0)
_SIZES = {
    name: flags.DEFINE_integer(name, None, f"{what}; wins over --like")
    for name, what in {
        "vocab_size": "rows of the embedding",
        "embed_dim": "width of the residual stream",
        "mlp_dim": "width of the MLP",
        "num_layers": "decoder layers",
        "num_heads": "query heads",
        "num_kv_heads": "key/value heads",
        "head_dim": "width of a head",
    }.items()
}


def main(_) -> None:
    # Weights are changed on the host.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from treespec_jax import checkpoints
    from treespec_jax.checkpoints import widening
    from treespec_jax.models import presets
    from treespec_jax.models.transformer import parameter_count

    sizes = {name: flag.value for name, flag in _SIZES.items()}
    if _LIKE.value:
        like = presets.get(_LIKE.value)
        sizes = {
            n: getattr(like, n) if size is None else size for n, size in sizes.items()
        }
    checkpoints.check_output(_OUTPUT.value)
    about = checkpoints.describe(_INPUT.value, _TOKENIZER.value)
    for note in about.notes:
        print(f"note: {note}", file=sys.stderr)
    config = widening.widened_config(about.config, sizes)
    small = checkpoints.load(_INPUT.value, tokenizer=_TOKENIZER.value)
    checkpoints.save(widening.widen(small, config, _SEED.value), _OUTPUT.value)
    print(
        f"wrote {_OUTPUT.value}: {parameter_count(config):,} parameters that compute "
        f"what {parameter_count(about.config):,} of {_INPUT.value} do"
    )


if __name__ == "__main__":
    cli.run(main)
