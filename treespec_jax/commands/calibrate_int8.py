"""Finds factors per channel that a model loses less with in int8; keeps them beside it.

  calibrate_int8 --target=CHAT_MODEL --text=book.txt
  evaluate --target=CHAT_MODEL --text=other.txt --weights=float32,int8

The largest activation of every channel is taken from some windows of the text. A part
of it moves into the matrix that reads the channel. Whatever reads the weights as int8
from then on, convert_checkpoint too, folds the factors in; weights in floating point
stay as they are.
"""

from __future__ import annotations

from pathlib import Path

from absl.flags import DEFINE_float, DEFINE_integer, DEFINE_string

from treespec_jax.checkpoints import catalogue, files, int8_scales
from treespec_jax.commands import flags, runtime
from treespec_jax.commands.evaluate import read_text
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import say


def define() -> None:
    DEFINE_string("target", catalogue.DEFAULT, "checkpoint: a path or name")
    DEFINE_string("text", None, "file of UTF-8 text", required=True)
    DEFINE_string("tokenizer", None, "tokenizer file; default: the checkpoint's own")
    DEFINE_integer("tokens", 4096, "of the text, at most", lower_bound=2)
    DEFINE_integer("window", 512, "tokens read together", lower_bound=2)
    words = "share of a channel's largest activation that moves, as its exponent"
    DEFINE_float("alpha", 0.7, words, lower_bound=0, upper_bound=1)
    words = f"file to write instead of {int8_scales.NAME} beside the weights"
    DEFINE_string("output", "", words)
    flags.define("compilation_cache")


def main(given) -> None:
    text = read_text(given.text)
    from treespec_jax import checkpoints

    about = checkpoints.describe(given.target, given.tokenizer)
    if about.tokenizer is None:
        raise UserError("the target has no tokenizer; name one with --tokenizer=PATH")
    file = Path(given.output or int8_scales.file_of(about.path)).expanduser()
    files.check_writable(file, "give --output=FILE in another folder")

    runtime.set_up(given.compilation_cache)
    import tqdm

    from treespec_jax.measurement import loss
    from treespec_jax.tuning import int8_scales as tuning

    windows = loss.windows(about.tokenizer.encode(text), given.tokens, given.window)
    loaded = checkpoints.load(about, "float32")
    shown = tqdm.tqdm(windows, unit="window")
    scales = tuning.find(loaded, shown, given.alpha)
    details = {
        "target": about.name,
        "text": Path(given.text).name,
        "tokens": int(windows.size),
        "alpha": given.alpha,
    }
    int8_scales.write(file, scales, details)
    say(f"wrote {file}")
