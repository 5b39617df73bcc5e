"""A sentencepiece vocabulary that gives back every text it was given.

BPE with byte fallback and no normalisation. The newline is a piece of its own:
sentencepiece reads lines and would otherwise never see one.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterable

import sentencepiece

from treespec_jax.errors import UserError

UNK, BOS, EOS = 0, 1, 2
FILE_NAME = "tokenizer.model"


def train(texts: Iterable[str], size: int) -> bytes:
    """Returns a serialised sentencepiece model of `size` pieces (BPE, byte fallback).

    Raises:
      UserError: there is too little text for so many pieces.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            # Rarer characters are spelt in bytes.
            character_coverage=0.9999,
            user_defined_symbols=["\n"],
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).split("] ")[-1].strip() or "too little text"
        raise UserError(
            f"cannot train a vocabulary of {size} pieces on this text: {reason}"
        ) from None
    return model.getvalue()


def load(path: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
    """Opens a .model file, or the one in a checkpoint folder.

    Raises:
      UserError: there is none, or it is not a sentencepiece model.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read the vocabulary {path}: {e.strerror}") from None
    except RuntimeError:
        raise UserError(f"{path} is not a sentencepiece model") from None
