"""Well-known models by name: their configurations as published; free of jax.

Values are those of `config.json` as published with the base models; of Llama 3.3 and
Qwen3, with the chat models. Other versions of the same size differ in

| what | where |
| --- | --- |
| tokens that end a text | most families |
| positions | Qwen2.5 (32768 in the chat models), base models of Qwen3 (32768) |
| epsilon of the norms | Qwen2.5 from 14B on: 1e-6 in the chat models, 1e-5 here |
"""

from __future__ import annotations

import dataclasses
import difflib

from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError


def names() -> list[str]:
    """The names of all presets, family by family."""
    return list(_PRESETS)


def get(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises:
      UserError: no preset has this name; says which one comes close.
    """
    config = _PRESETS.get(name.lower())
    if config is None:
        near = difflib.get_close_matches(name.lower(), _PRESETS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no model is called {name!r}; {hint}(scripts/list_models.py lists them)"
        )
    return config


def _decoder(D, F, L, N, K, H=None, **fields) -> ModelConfig:
    return ModelConfig(
        embed_dim=D,
        mlp_dim=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H or D // N,
        **fields,
    )


def _llama2(*sizes, **changes):
    fields = dict(vocab_size=32000, max_positions=4096, norm_eps=1e-5)
    return _decoder(*sizes, **{**fields, **changes})


def _llama3(*sizes, factor=None, **changes):
    """Llama 3; with a factor, 3.1 and later."""
    rotary = RotaryConfig(500000.0)
    if factor:
        rotary = dataclasses.replace(
            rotary, scaling="llama3", factor=factor, original_max_positions=8192
        )
    return _decoder(
        *sizes,
        vocab_size=128256,
        max_positions=131072 if factor else 8192,
        rotary=rotary,
        norm_eps=1e-5,
        bos_id=128000,
        eos_ids=(128001,),
        **changes,
    )


def _mistral(*sizes, **changes):
    fields = dict(max_positions=32768, norm_eps=1e-5, family="mistral")
    return _decoder(*sizes, **fields, **changes)


def _smollm(*sizes, **changes):
    fields = dict(vocab_size=49152, norm_eps=1e-5, tied_embeddings=True)
    return _decoder(*sizes, **fields, bos_id=0, eos_ids=(0,), **changes)


def _qwen2(*sizes, **changes):
    fields = dict(
        vocab_size=152064,
        max_positions=131072,
        rotary=RotaryConfig(1e6),
        norm_eps=1e-6,
        qkv_bias=True,
        family="qwen2",
        bos_id=151643,
        eos_ids=(151643,),
    )
    return _decoder(*sizes, **{**fields, **changes})


def _qwen3(*sizes, **changes):
    return _decoder(
        *sizes,
        128,
        vocab_size=151936,
        max_positions=40960,
        rotary=RotaryConfig(1e6),
        norm_eps=1e-6,
        qk_norm=True,
        family="qwen3",
        bos_id=151643,
        eos_ids=(151645,),
        **changes,
    )


def _gemma(*sizes, **changes):
    fields = dict(
        vocab_size=256000,
        max_positions=8192,
        norm_eps=1e-6,
        tied_embeddings=True,
        scaled_embeddings=True,
        unit_offset_norms=True,
        activation="gelu_tanh",
        family="gemma",
        bos_id=2,
        eos_ids=(1,),
    )
    return _decoder(*sizes, **{**fields, **changes})


def _gemma2(D, F, L, *heads, scalar=256):
    return _gemma(
        *(D, F, L, *heads),
        window=4096,
        local_layers=tuple(range(0, L, 2)),
        post_norms=True,
        attention_scale=scalar**-0.5,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        family="gemma2",
    )


def _gemma3(D, F, L, *heads, scalar=256, window=1024, **changes):
    """The text part; every sixth layer sees all of the text."""
    fields = dict(
        vocab_size=262208,
        max_positions=131072,
        rotary=RotaryConfig(1e6, "linear", 8.0),
    )
    return _gemma(
        *(D, F, L, *heads),
        local_rotary=RotaryConfig(10000.0),
        window=window,
        local_layers=tuple(i for i in range(L) if (i + 1) % 6),
        qk_norm=True,
        post_norms=True,
        attention_scale=scalar**-0.5,
        family="gemma3",
        **{**fields, **changes},
    )


# The small ones have no images, and were not stretched.
_SMALL_GEMMA3 = dict(
    window=512, vocab_size=262144, max_positions=32768, rotary=RotaryConfig(1e6)
)
_SMALL_QWEN2 = dict(vocab_size=151936, tied_embeddings=True)
_SMOLLM = dict(max_positions=2048)
_SMOLLM2 = dict(max_positions=8192, rotary=RotaryConfig(100000.0))

# Width, MLP width, layers, query heads, key/value heads, head width if not D / N.
_PRESETS = {
    "tinyllama-1.1b": _llama2(2048, 5632, 22, 32, 4, max_positions=2048),
    "llama-2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama3(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama3(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8, factor=8.0),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8, factor=8.0),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128, 8, factor=8.0),
    "llama-3.2-1b": _llama3(
        *(2048, 8192, 16, 32, 8), factor=32.0, tied_embeddings=True
    ),
    "llama-3.2-3b": _llama3(
        *(3072, 8192, 28, 24, 8), factor=32.0, tied_embeddings=True
    ),
    "llama-3.3-70b": dataclasses.replace(
        # Published as a chat model only.
        _llama3(8192, 28672, 80, 64, 8, factor=8.0),
        eos_ids=(128001, 128008, 128009),
    ),
    "smollm-135m": _smollm(576, 1536, 30, 9, 3, **_SMOLLM),
    "smollm-360m": _smollm(960, 2560, 32, 15, 5, **_SMOLLM),
    "smollm-1.7b": _smollm(2048, 8192, 24, 32, 32, **_SMOLLM),
    "smollm2-135m": _smollm(576, 1536, 30, 9, 3, **_SMOLLM2),
    "smollm2-360m": _smollm(960, 2560, 32, 15, 5, **_SMOLLM2),
    "smollm2-1.7b": _smollm(
        *(2048, 8192, 24, 32, 32), max_positions=8192, rotary=RotaryConfig(130000.0)
    ),
    "mistral-7b-v0.1": _mistral(
        *(4096, 14336, 32, 32, 8),
        vocab_size=32000,
        window=4096,
        local_layers=tuple(range(32)),
    ),
    "mistral-7b-v0.3": _mistral(
        *(4096, 14336, 32, 32, 8), vocab_size=32768, rotary=RotaryConfig(1e6)
    ),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, **_SMALL_QWEN2, max_positions=32768),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, **_SMALL_QWEN2),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, **_SMALL_QWEN2, max_positions=32768),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, norm_eps=1e-5),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, norm_eps=1e-5),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, norm_eps=1e-5),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "gemma-2b": _gemma(2048, 16384, 18, 8, 1, 256),
    "gemma-7b": _gemma(3072, 24576, 28, 16, 16, 256),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4, 256),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, 8, 256),
    "gemma-2-27b": _gemma2(4608, 36864, 46, 32, 16, 128, scalar=144),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 256, **_SMALL_GEMMA3),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256, **_SMALL_GEMMA3),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128, scalar=168),
}
