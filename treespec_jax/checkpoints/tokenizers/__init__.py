"""Tokenizers of one class: sentencepiece, tokenizer.json, llama2.c tok.bin, GGUF."""

from treespec_jax.checkpoints.tokenizers.base import TextStream, Tokenizer
from treespec_jax.checkpoints.tokenizers.files import find_tokenizer, load_tokenizer
from treespec_jax.checkpoints.tokenizers.spellings import spellings
from treespec_jax.checkpoints.tokenizers.vocabulary import (
    check_pair,
    check_rows,
    compare_vocabularies,
    fingerprint,
)

__all__ = [
    "TextStream",
    "Tokenizer",
    "check_pair",
    "check_rows",
    "compare_vocabularies",
    "find_tokenizer",
    "fingerprint",
    "load_tokenizer",
    "spellings",
]
