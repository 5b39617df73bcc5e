"""Tokenizers behind one protocol: sentencepiece, tokenizer.json, llama2.c tok.bin."""

from treespec_jax.checkpoints.tokenizers.base import TextStream, Tokenizer
from treespec_jax.checkpoints.tokenizers.files import find_tokenizer, load_tokenizer
from treespec_jax.checkpoints.tokenizers.llama2c import Llama2cTokenizer
from treespec_jax.checkpoints.tokenizers.sentencepiece import SentencePieceTokenizer
from treespec_jax.checkpoints.tokenizers.settings import AddedToken, TokenizerSettings
from treespec_jax.checkpoints.tokenizers.tokenizer_json import HuggingFaceTokenizer
from treespec_jax.checkpoints.tokenizers.vocabulary import (
    check_pair,
    check_rows,
    compare_vocabularies,
)

__all__ = [
    "AddedToken",
    "HuggingFaceTokenizer",
    "Llama2cTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "Tokenizer",
    "TokenizerSettings",
    "check_pair",
    "check_rows",
    "compare_vocabularies",
    "find_tokenizer",
    "load_tokenizer",
]
