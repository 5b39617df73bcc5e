"""Greedy decoding with a short chain: the cheapest tree there is.

Give the models by flag: --target=PATH --draft=PATH.
"""

from treespec_jax.commands.settings import default_config


def get_config():
    config = default_config()
    config.speculative.tree = "chain:3"
    config.sampling.temperature = 0.0
    return config
