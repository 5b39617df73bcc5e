"""Measures loss and perplexity of a text, for one or several types of weights.

  evaluate --target=smollm2-135m-instruct --text=book.txt --weights=float32,int8

The text is cut into windows that are read one by one, each without those before it;
the first token of a window is not judged. With several types, each is compared with
the first: its loss, and how often both have the same likeliest token. --exact=bitwise
measures types of int8 a second time, in the arithmetic of that mode.
"""

from __future__ import annotations

from pathlib import Path

from absl.flags import DEFINE_enum, DEFINE_integer, DEFINE_list, DEFINE_string

from treespec_jax.checkpoints import catalogue
from treespec_jax.commands import flags, runtime
from treespec_jax.config import EngineConfig
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import Study
from treespec_jax.models.weight_types import FLOATS, check_weights, is_int8


def define() -> None:
    DEFINE_string("target", catalogue.DEFAULT, "checkpoint: a path or name")
    DEFINE_string("text", None, "file of UTF-8 text", required=True)
    DEFINE_list("weights", "float32", "float32, bfloat16, int8, int8:128 …")
    DEFINE_string("dtype", "float32", "of activations")
    DEFINE_enum("exact", "", EngineConfig.EXACT, "also measure int8 so: bitwise")
    DEFINE_string("tokenizer", None, "tokenizer file; default: the checkpoint's own")
    DEFINE_integer("tokens", 16384, "of the text, at most", lower_bound=2)
    DEFINE_integer("window", 512, "tokens read together", lower_bound=2)
    flags.define("output", "compilation_cache")


def main(given) -> None:
    kinds = list(dict.fromkeys(map(check_weights, given.weights)))
    if not kinds:
        raise UserError("--weights is empty; name a type, float32 for example")
    if given.dtype not in FLOATS:
        raise UserError(f"--dtype={given.dtype}: give one of {', '.join(FLOATS)}")
    if given.exact and not any(map(is_int8, kinds)):
        raise UserError("--exact=bitwise is for int8 weights; give --weights=int8")
    if given.exact and given.dtype != "float32":
        raise UserError(f"--exact=bitwise wants --dtype=float32, got {given.dtype}")
    text = read_text(given.text)

    runtime.set_up(given.compilation_cache)
    from treespec_jax import checkpoints
    from treespec_jax.measurement import loss

    about = checkpoints.describe(given.target, given.tokenizer)
    if about.tokenizer is None:
        raise UserError("the target has no tokenizer; name one with --tokenizer=PATH")
    windows = loss.windows(about.tokenizer.encode(text), given.tokens, given.window)
    job = loss.Job(about, given.dtype, kinds, windows, given.exact)
    Study(job.measure, loss.table).carry_out(given.output, must_write=False)


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
      UserError: it is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--text={path} is not UTF-8 text; give another file") from None
