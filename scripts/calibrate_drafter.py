"""Fits tau, a drafter's temperature of its own estimates; keeps it beside its weights.

Read as the default from then on wherever the drafter is used.
"""

from absl import flags

from treespec_jax import cli
from treespec_jax.experiments import settings

_CONFIG = cli.define_config()
_TARGET = flags.DEFINE_string("target", None, "target's checkpoint; else the bundled")
_DRAFT = flags.DEFINE_string("draft", None, "drafter's checkpoint")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file, if not the own")
_PROMPTS = flags.DEFINE_string(
    "prompts_file", "", "a prompt a line; else story openings"
)
_TREE = flags.DEFINE_string("tree", "regular:8x1", "the tree to look at; must branch")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the texts")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "tokens to emit per prompt")
_SEED = flags.DEFINE_integer("seed", None, "of the noise of the first prompt")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16")
_MAX_BATCH = flags.DEFINE_integer("max_batch", None, "texts decoded together")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "tokens per text, prompt included")
_OUTPUT = flags.DEFINE_string(
    "output", "", "file to write instead of calibration.json in the drafter's folder"
)
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def main(_):
    experiment = settings.build(
        _CONFIG.value,
        {
            "target": _TARGET.value,
            "draft": _DRAFT.value,
            "tokenizer": _TOKENIZER.value,
            "tree": _TREE.value,
            "dtype": _DTYPE.value,
            "sampling.temperature": _TEMPERATURE.value,
            "sampling.max_tokens": _MAX_TOKENS.value,
            "sampling.seed": _SEED.value,
            "engine.max_batch": _MAX_BATCH.value,
            "engine.max_len": _MAX_LEN.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=True)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import calibrate, runtime

    calibrate.check_tree(experiment.tree)
    runtime.set_up(_CACHE.value)
    calibrate.run(experiment, _PROMPTS.value, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
