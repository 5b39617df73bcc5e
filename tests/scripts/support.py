"""What tests of scripts share."""

from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# A file of settings for --config.
CONFIG = """
from treespec_jax.commands.settings import default_config

def get_config():
    config = default_config()
    config.speculative.tree = "none"
    config.sampling.max_tokens = 5
    config.sampling.top_k = 7
    config.sampling.seed = 1
    return config
"""
