"""Compares acceptance rules on tree shapes and temperatures; table, JSON and plot."""

from absl import flags

from treespec_jax import cli
from treespec_jax.experiments import common_flags, settings

_CONFIG = cli.define_config()
_SHARED = common_flags.define(
    "target",
    "draft",
    "tokenizer",
    "dtype",
    "max_tokens",
    "seed",
    "max_batch",
    "max_len",
    "output",
    "compilation_cache",
)
_PROMPTS = flags.DEFINE_string(
    "prompts_file", None, "a prompt a line; else story openings"
)
_RULES = flags.DEFINE_list("rules", None, "exact,token,block,…; else all")
_SHAPES = flags.DEFINE_list("shapes", None, "chain:3,regular:3x2x1,dynamic:7@4")
_TEMPERATURES = flags.DEFINE_list("temperatures", None, "0,0.5,1")
_REPEAT = flags.DEFINE_integer("repeat", None, "rounds of everything")
_RECORD = flags.DEFINE_bool(
    "record", None, "also say how often the drafter's estimates come true"
)


def main(_):
    comparison = settings.comparison(
        {
            "rules": _RULES.value,
            "shapes": _SHAPES.value,
            "temperatures": _TEMPERATURES.value,
            "repeat": _REPEAT.value,
            "prompts": _PROMPTS.value,
            "record": _RECORD.value,
        }
    )
    given = _SHARED.settings()
    if _CONFIG.value is None:
        # A machine by itself is measured, and in minutes.
        defaults = {"engine.max_batch": 1, "sampling.max_tokens": 32}
        given |= {name: v for name, v in defaults.items() if given[name] is None}
    experiment = settings.build(_CONFIG.value, given)
    experiment = experiment.with_paths(needs_drafter=True)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import compare_rules, runtime

    runtime.set_up(_SHARED["compilation_cache"])
    compare_rules.run(experiment, comparison, _SHARED["output"])


if __name__ == "__main__":
    cli.run(main)
