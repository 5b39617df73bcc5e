"""A model that trains in a minute: what `train_lm` trains without a --config."""

from treespec_jax.commands.train_tiny import get_config

__all__ = ["get_config"]
