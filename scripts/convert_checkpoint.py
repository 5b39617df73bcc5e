"""Converts a checkpoint to this package's own format.

Reads a Hugging Face folder, a llama2.c .bin file or a folder that this script
wrote; writes a folder with the weights (orbax), the configuration and the tokenizer:

  convert_checkpoint.py --input=stories260K.bin --tokenizer=tok512.bin --output=stories

After a kill, an interrupt or a full disk the same command goes on where it stopped.
"""

import os
import sys

from absl import flags

from treespec_jax import cli

_INPUT = flags.DEFINE_string("input", None, "checkpoint to read", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "of the parameters in the output; default: as in the input",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer file; default: the one found with the input"
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "start over instead of going on where an earlier run stopped"
)


def main(_) -> None:
    # Weights go from file to file; an accelerator would only lend its memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import tqdm

    from treespec_jax import checkpoints

    def bar(groups):
        total = sum(group.nbytes for group in groups)
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="writing") as shown:
            for group in groups:
                yield group
                shown.update(group.nbytes)

    checkpoints.check_output(_OUTPUT.value)
    about = checkpoints.describe(_INPUT.value, _TOKENIZER.value)
    for note in about.notes:
        print(f"note: {note}", file=sys.stderr)
    done = checkpoints.convert(
        about, _OUTPUT.value, _DTYPE.value, restart=_RESTART.value, progress=bar
    )
    if done.resumed:
        print(f"{done.resumed:,} bytes were there from an earlier run", file=sys.stderr)
    kind = about.tokenizer.file_name if about.tokenizer else "no tokenizer"
    print(
        f"wrote {_OUTPUT.value}: {done.parameters:,} parameters in {done.dtype.name}, "
        f"{kind}"
    )


if __name__ == "__main__":
    cli.run(main)
