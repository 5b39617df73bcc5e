"""Compares tree shapes on one pair of models; writes a table, JSON and a plot."""

from absl import flags

from treespec_jax import cli
from treespec_jax.experiments import settings

_CONFIG = cli.define_config()
_TARGET = flags.DEFINE_string("target", None, "target's checkpoint; else the bundled")
_DRAFT = flags.DEFINE_string("draft", None, "drafter's checkpoint")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file, if not the own")
_PROMPTS = flags.DEFINE_string("prompts", None, "a prompt a line; else story openings")
_SHAPES = flags.DEFINE_list("shapes", None, "none,chain:3,regular:3x2x1,dynamic:15@5")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "tokens to emit per prompt")
_REPEAT = flags.DEFINE_integer("repeat", None, "rounds of all shapes on all prompts")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy")
_SEED = flags.DEFINE_integer("seed", None, "of the noise of the first prompt")
_RULE = flags.DEFINE_string("rule", None, "exact, token, block, traversal, typical")
_DRAWS = flags.DEFINE_string(
    "draws", None, "shared, sampled, with_replacement, best; else as the rule has it"
)
_CASCADE = flags.DEFINE_string(
    "cascade", None, "LOSSY: chow, diff, opt, token_v1, token_v2 or token_v3"
)
_ALPHA = flags.DEFINE_float("alpha", None, "of the cascade, in [0, 1]")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16")
_MAX_BATCH = flags.DEFINE_integer("max_batch", None, "texts decoded together; else 1")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "tokens per text, prompt included")
_OUTPUT = flags.DEFINE_string("output", "", "folder to write to")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def main(_):
    slots = _MAX_BATCH.value
    if slots is None and _CONFIG.value is None:
        slots = 1
    experiment = settings.build(
        _CONFIG.value,
        {
            "target": _TARGET.value,
            "draft": _DRAFT.value,
            "tokenizer": _TOKENIZER.value,
            "rule": _RULE.value,
            "draws": _DRAWS.value,
            "cascade": _CASCADE.value,
            "alpha": _ALPHA.value,
            "dtype": _DTYPE.value,
            "sampling.max_tokens": _MAX_TOKENS.value,
            "sampling.temperature": _TEMPERATURE.value,
            "sampling.seed": _SEED.value,
            "engine.max_batch": slots,
            "engine.max_len": _MAX_LEN.value,
            "benchmark.shapes": _SHAPES.value,
            "benchmark.repeat": _REPEAT.value,
            "benchmark.prompts": _PROMPTS.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=experiment.compares_trees)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import benchmark, runtime

    runtime.set_up(_CACHE.value)
    benchmark.run(experiment, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
