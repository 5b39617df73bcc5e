"""Checkpoints and tokenizers: read three formats, write one."""

from treespec_jax.checkpoints.loading import LoadedModel, load
from treespec_jax.checkpoints.native import check_output, save
from treespec_jax.checkpoints.tokenizers import (
    TextStream,
    Tokenizer,
    load_tokenizer,
    same_vocabulary,
)

__all__ = [
    "LoadedModel",
    "TextStream",
    "Tokenizer",
    "check_output",
    "load",
    "load_tokenizer",
    "same_vocabulary",
    "save",
]
