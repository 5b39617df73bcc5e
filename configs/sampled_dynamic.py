"""Sampling at a moderate temperature; a dynamic tree follows the drafter's doubts."""

from treespec_jax.commands.settings import default_config


def get_config():
    config = default_config()
    config.speculative.tree = "dynamic:15@5"
    config.sampling.temperature = 0.7
    config.sampling.top_p = 0.9
    config.sampling.max_tokens = 256
    return config
