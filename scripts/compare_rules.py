"""Compares acceptance rules on tree shapes and temperatures; table, JSON and plot."""

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
_RULES = flags.DEFINE_list("rules", None, "exact,token,block,…; else all")
_SHAPES = flags.DEFINE_list("shapes", None, "chain:3,regular:3x2x1,dynamic:15@5")
_TEMPERATURES = flags.DEFINE_list("temperatures", None, "0,0.5,1")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "tokens to emit per prompt")
_REPEAT = flags.DEFINE_integer("repeat", None, "rounds of everything")
_SEED = flags.DEFINE_integer("seed", None, "of the noise of the first prompt")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16")
_MAX_BATCH = flags.DEFINE_integer("max_batch", None, "texts decoded together; else 1")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "tokens per text, prompt included")
_OUTPUT = flags.DEFINE_string("output", "", "folder to write to")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def main(_):
    given = {
        "rules": _RULES.value,
        "shapes": _SHAPES.value,
        "temperatures": _TEMPERATURES.value,
        "repeat": _REPEAT.value,
        "prompts": _PROMPTS.value,
    }
    comparison = settings.RuleComparison(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )
    slots = _MAX_BATCH.value
    if slots is None and _CONFIG.value is None:
        slots = 1
    experiment = settings.build(
        _CONFIG.value,
        {
            "target": _TARGET.value,
            "draft": _DRAFT.value,
            "tokenizer": _TOKENIZER.value,
            "dtype": _DTYPE.value,
            "sampling.max_tokens": _MAX_TOKENS.value,
            "sampling.seed": _SEED.value,
            "engine.max_batch": slots,
            "engine.max_len": _MAX_LEN.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=True)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import compare_rules, runtime

    runtime.set_up(_CACHE.value)
    compare_rules.run(experiment, comparison, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
