"""Tiny drafter trainings: a random target, and texts that repeat themselves."""

from __future__ import annotations

import numpy as np

from tests.conftest import TINY
from treespec_jax.checkpoints import LoadedModel
from treespec_jax.training import drafter_settings
from treespec_jax.training.answers import Answers, MaskedRows

T = 12
METHODS = drafter_settings.METHODS


def loaded(target) -> LoadedModel:
    """The tiny target as a checkpoint without a tokenizer."""
    return LoadedModel(TINY, target, None, "tiny", np.dtype("float32"))


def rows(count: int, seed: int = 0) -> MaskedRows:
    """Random tokens, three quarters of which count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, TINY.vocab_size, (count, T + 1)).astype(np.int32)
    return MaskedRows(tokens, rng.random((count, T + 1)) < 0.75)


def answers(texts: int = 24, length: int = 40) -> Answers:
    """Each text counts upwards in one of three strides, after a prompt of two."""
    starts = np.arange(texts)[:, None] * 7
    strides = 1 + np.arange(texts)[:, None] % 3
    tokens = 3 + (starts + strides * np.arange(length)) % (TINY.vocab_size - 3)
    return Answers(
        tokens.reshape(-1).astype(np.int32),
        np.arange(texts + 1) * length,
        np.full(texts, 2, np.int32),
        np.zeros(texts, np.float32),
        ("counts",) * texts,
    )


def config(method: str, output="unused", **parts) -> drafter_settings.DrafterTraining:
    """A run of eight steps; `parts` are changes, by part."""
    values = {
        "method": method,
        "target": "tiny",
        "data": {
            "row_tokens": T,
            "batch_rows": 4,
            "micro_rows": 2,
            "held_out": 0.2,
        },
        "drafter": {"heads": 3},
        "objective": {"predictions": 3},
        "optimizer": {"steps": 8, "peak": 2e-2, "warmup": 1, "decay": 3},
        "run": {
            "output": str(output),
            "eval_every": 4,
            "eval_rows": 4,
            "progress": False,
            "save_minutes": 0.0,
            "export_dtype": "float32",
        },
    }
    for name, change in parts.items():
        values[name] = values.get(name, {}) | change
    return drafter_settings.build(values)
