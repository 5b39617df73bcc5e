"""Converts a checkpoint to this package's own format.

Reads a Hugging Face folder, a llama2.c .bin file or a folder that this script
wrote; writes a folder with the weights (orbax), the configuration and the tokenizer:

  convert_checkpoint.py --input=stories260K.bin --tokenizer=tok512.bin --output=stories
"""

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


def main(_) -> None:
    import tqdm

    from treespec_jax import checkpoints
    from treespec_jax.checkpoints.families import parameter_count

    def bar(parameters):
        return tqdm.tqdm(parameters, desc="reading", unit="tensor")

    checkpoints.check_output(_OUTPUT.value)
    loaded = checkpoints.load(
        _INPUT.value, _DTYPE.value, tokenizer=_TOKENIZER.value, progress=bar
    )
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    checkpoints.save(loaded, _OUTPUT.value)
    count = parameter_count(loaded.config)
    kind = loaded.tokenizer.file_name if loaded.tokenizer else "no tokenizer"
    print(f"wrote {_OUTPUT.value}: {count:,} parameters in {loaded.dtype.name}, {kind}")


if __name__ == "__main__":
    cli.run(main)
