"""The benchmark of a 110M target with a 5M drafter, one text at a time.

Give the models by flag: --target=PATH --draft=PATH --tokenizer=PATH.
docs/performance.md has the commands that make them.
"""

from treespec_jax.commands.settings import default_config


def get_config():
    config = default_config()
    config.dtype = "float32"
    config.speculative.tree = "chain:3"
    config.sampling.max_tokens = 128
    config.sampling.ignore_eos = True
    config.engine.max_batch = 1
    config.engine.max_len = 256
    config.benchmark.shapes = (
        "chain:3",
        "chain:5",
        "regular:3x2x1",
        "dynamic:7@4",
        "dynamic:15@5",
    )
    config.benchmark.rounds = 3
    return config
