"""`exact="bitwise"` of all that other families add, in sizes that fill no vector.

Apart from `test_bitwise.py`, so that two processes share what they compile.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.conftest import TINY
from tests.engine.bitwise import BitwiseContract

# Not all code generators of XLA give one row and many the same bits.
pytestmark = [pytest.mark.slow, pytest.mark.optimised]


class TestGemma(BitwiseContract):
    config = dataclasses.replace(
        TINY,
        embed_dim=52,
        mlp_dim=76,
        num_kv_heads=1,
        head_dim=12,
        activation="gelu_tanh",
        qkv_bias=True,
        qk_norm=True,
        window=13,
        local_layers=(0,),
        post_norms=True,
        unit_offset_norms=True,
        scaled_embeddings=True,
        attention_soft_cap=4.0,
        logit_soft_cap=9.0,
    )
