"""What loading gives and saving takes."""

from __future__ import annotations

import dataclasses

import numpy as np

from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its weights.

    Attributes:
      config: shape and constants; `bos_id` is the tokenizer's if there is one, and
        `eos_ids` holds its ends of text too.
      model: the decoder, its parameters in `dtype`.
      tokenizer: or None if the checkpoint has none.
      source: name of the file or folder that it came from.
      dtype: of the parameters.
      notes: what of the checkpoint was left out, a line each.
      tau: fitted for it as a drafter, or None (`calibration`).
    """

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer | None
    source: str
    dtype: np.dtype
    notes: tuple[str, ...] = ()
    tau: float | None = None
