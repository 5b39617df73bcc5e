"""Fits tau, a drafter's temperature of its own estimates; keeps it beside its weights.

Read as the default from then on wherever the drafter is used.
"""

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
    "compilation_cache",
)
_PROMPTS = flags.DEFINE_string(
    "prompts_file", "", "a prompt a line; else story openings"
)
_TREE = flags.DEFINE_string("tree", "regular:8x1", "the tree to look at; must branch")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the texts")
_OUTPUT = flags.DEFINE_string(
    "output", "", "file to write instead of calibration.json in the drafter's folder"
)


def main(_):
    experiment = settings.build(
        _CONFIG.value,
        {
            **_SHARED.settings(),
            "tree": _TREE.value,
            "sampling.temperature": _TEMPERATURE.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=True)

    # Heavy imports only now, so that a bad flag answers at once.
    from treespec_jax.experiments import calibrate, runtime

    calibrate.check_tree(experiment.tree)
    runtime.set_up(_SHARED["compilation_cache"])
    calibrate.run(experiment, _PROMPTS.value, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
