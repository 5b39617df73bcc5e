"""Makes a checkpoint larger without changing its function.

Reads what convert_checkpoint reads, and writes a folder of the same kind. The larger
model gives the same logits (up to rounding) at the cost of its size:

  widen_checkpoint --input=stories260K.bin --tokenizer=tok512.bin --output=wide \\
      --embed_dim=768 --mlp_dim=2048 --num_layers=12 --vocab_size=32000

Sizes that are not given stay. treespec_jax/checkpoints/widening.py has the formulas.
"""

from __future__ import annotations

import os
import sys

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_string

_SIZES = {
    "vocab_size": "rows of the embedding",
    "embed_dim": "width of the residual stream",
    "mlp_dim": "width of the MLP",
    "num_layers": "decoder layers",
    "num_heads": "query heads",
    "num_kv_heads": "key/value heads",
    "head_dim": "width of a head",
}


def define() -> None:
    DEFINE_string("input", None, "checkpoint to read", required=True)
    DEFINE_string("output", None, "folder to write to", required=True)
    DEFINE_string(
        "tokenizer", None, "tokenizer file; default: the one found with the input"
    )
    words = "take all sizes from this model (list_models names them)"
    DEFINE_bool("overwrite", False, "replace a model in the output folder")
    DEFINE_string("like", None, words)
    DEFINE_string("dtype", None, "of the weights; default: as they are stored")
    DEFINE_integer("seed", 0, "of the random weights", lower_bound=0)
    for name, what in _SIZES.items():
        DEFINE_integer(name, None, f"{what}; default: that of --like, or as it is")


def main(given) -> None:
    # Weights are changed on the host.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from treespec_jax import checkpoints
    from treespec_jax.checkpoints import names, saving, widening
    from treespec_jax.models import presets
    from treespec_jax.models.transformer import parameter_count

    like, sizes = presets.get(given.like) if given.like else None, {}
    for name in _SIZES:
        size = given[name].value
        sizes[name] = getattr(like, name, None) if size is None else size
    checkpoints.check_output(given.output)
    saving.check_apart(given.output, input=names.here(given.input))
    saving.check_replaced(given.output, {}, given.overwrite)
    about = checkpoints.describe(given.input, given.tokenizer)
    for note in about.notes:
        print(f"note: {note}", file=sys.stderr)
    config = widening.widened_config(about.config, sizes)
    small = checkpoints.load(about, given.dtype)
    checkpoints.save(widening.widen(small, config, given.seed), given.output)
    print(
        f"wrote {given.output}: {parameter_count(config):,} parameters that compute "
        f"what {parameter_count(about.config):,} of {given.input} do"
    )
