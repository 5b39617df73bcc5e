"""The demo: the pair that comes with the package, greedy, with a dynamic tree."""

from treespec_jax.commands.settings import default_config


def get_config():
    config = default_config()
    config.speculative.tree = "dynamic:15@5"
    config.sampling.max_tokens = 128
    return config
