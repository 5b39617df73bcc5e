"""Converts a checkpoint to this package's own format.

Reads a Hugging Face folder, a GGUF file, a llama2.c .bin file or a folder that this
command wrote; writes a folder with the weights (orbax), the configuration and the
tokenizer:

  convert_checkpoint --input=stories260K.bin --tokenizer=tok512.bin --output=stories

After a kill, an interrupt or a full disk the same command goes on where it stopped. A
folder that holds another model is replaced with --overwrite only.

An EAGLE or Medusa drafter is converted for its target:

  convert_checkpoint --input=EAGLE_FOLDER --target=FOLDER --output=eagle
"""

from __future__ import annotations

import os
import sys

from absl.flags import DEFINE_bool, DEFINE_enum, DEFINE_string

from treespec_jax.errors import UserError


def define() -> None:
    DEFINE_string("input", None, "checkpoint to read", required=True)
    DEFINE_string("output", None, "folder to write to", required=True)
    words = "of the parameters in the output; default: as in the input"
    DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], words)
    DEFINE_string(
        "weights", None, "of the matrices: as --dtype (the default), int8 or int8:128"
    )
    DEFINE_string(
        "tokenizer", None, "tokenizer file; default: the one found with the input"
    )
    DEFINE_string("target", None, "of an EAGLE or Medusa drafter, its target")
    DEFINE_bool("overwrite", False, "replace another model in the output folder")
    DEFINE_bool("restart", False, "start over instead of going on where a run stopped")


def main(given) -> None:
    # Weights go from file to file; an accelerator would only lend its memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import tqdm

    from treespec_jax import checkpoints
    from treespec_jax.checkpoints import drafters, names, saving
    from treespec_jax.models.weight_types import check_weights

    path = names.here(given.input)
    if given.target or (path is not None and drafters.method_of(path)):
        convert_drafter(given)
        return

    def bar(groups):
        total = sum(group.nbytes for group in groups)
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="writing") as shown:
            for group in groups:
                yield group
                shown.update(group.nbytes)

    output, weights = given.output, given.weights and check_weights(given.weights)
    checkpoints.check_output(output)
    about = checkpoints.describe(given.input, given.tokenizer)
    for note in about.notes:
        print(f"note: {note}", file=sys.stderr)
    saving.check_apart(output, input=path, tokenizer=given.tokenizer)
    options = {"restart": given.restart, "overwrite": given.overwrite, "progress": bar}
    done = checkpoints.convert(about, output, given.dtype, weights, **options)
    if done.resumed:
        print(f"{done.resumed:,} bytes were there from an earlier run", file=sys.stderr)
    kind = about.tokenizer.file_name if about.tokenizer else "no tokenizer"
    stored = done.types.weights
    print(f"wrote {output}: {done.parameters:,} parameters in {stored}, {kind}")


def convert_drafter(given) -> None:
    """Converts a drafter over its target's rows.

    Raises:
      UserError: no target is named, or the input is no drafter for it.
    """
    from treespec_jax import checkpoints
    from treespec_jax.checkpoints import conversion, drafters, names, saving

    if given.weights:
        raise UserError("--weights is not for drafters; they take their target's")
    if not given.target:
        raise UserError(
            f"--input={given.input} holds a drafter; name its target with --target"
        )
    output, source = given.output, names.here(given.input)
    drafters.check_output(output)
    saving.check_apart(output, input=source, target=names.here(given.target))
    about = checkpoints.describe(given.target, given.tokenizer)
    found = drafters.describe_drafter(given.input, about)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    dtype = given.dtype or found.dtype
    inputs = conversion.inputs_of(found.open().source.files())
    origin = {"source": found.name or source.name, "inputs": inputs}
    saving.check_replaced(output, {**origin, "dtype": dtype}, given.overwrite)
    loaded = drafters.load_drafter(found, checkpoints.load(about, dtype))
    drafters.save(loaded.model, output, target=about, dtype=dtype, origin=origin)
    print(f"wrote {output}: method {found.method}, {dtype}")
