"""Compares tree shapes on one pair of models; writes a table, JSON and a plot."""

from absl import flags

from treespec_jax import cli
from treespec_jax.experiments import common_flags, settings

_CONFIG = cli.define_config()
_SHARED = common_flags.define(
    "target",
    "draft",
    "tokenizer",
    "rule",
    "proposal",
    "cascade",
    "alpha",
    "dtype",
    "max_tokens",
    "temperature",
    "seed",
    "max_batch",
    "max_len",
    "output",
    "compilation_cache",
)
_PROMPTS = flags.DEFINE_string("prompts", None, "a prompt a line; else story openings")
_SHAPES = flags.DEFINE_list("shapes", None, "none,chain:3,regular:3x2x1,dynamic:15@5")
_REPEAT = flags.DEFINE_integer("repeat", None, "rounds of all shapes on all prompts")
_RECORD = flags.DEFINE_bool(
    "record", None, "also say how often the drafter's estimates come true"
)


def main(_):
    given = _SHARED.settings()
    if given["engine.max_batch"] is None and _CONFIG.value is None:
        given["engine.max_batch"] = 1
    experiment = settings.build(
        _CONFIG.value,
        {
            **given,
            "benchmark.shapes": _SHAPES.value,
            "benchmark.repeat": _REPEAT.value,
            "benchmark.prompts": _PROMPTS.value,
            "benchmark.record": _RECORD.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=experiment.compares_trees)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import benchmark, runtime

    runtime.set_up(_SHARED["compilation_cache"])
    benchmark.run(experiment, _SHARED["output"])


if __name__ == "__main__":
    cli.run(main)
