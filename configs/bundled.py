"""The demo: the pair that comes with the package, greedy, with a dynamic tree."""

from treespec_jax.experiments.settings import default_config


def get_config():
    config = default_config()
    config.tree = "dynamic:15@5"
    config.sampling.max_tokens = 128
    return config
