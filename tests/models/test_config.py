"""A configuration checks itself and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.models.decoder import FAMILIES, PLAIN
from treespec_jax.checks import from_mapping
from treespec_jax.config import ModelConfig, RotaryConfig
from treespec_jax.errors import UserError

CONFIGS = {
    **FAMILIES,
    "factors": dataclasses.replace(
        PLAIN,
        rotary=RotaryConfig(scaling="factors", factors=(1.0,) * (PLAIN.head_dim // 2)),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name):
    """Equal and of equal hash: lists become tuples, rotary settings their class."""
    config = CONFIGS[name]
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    again = from_mapping(ModelConfig, values, "model")
    assert again == config and hash(again) == hash(config)
    assert isinstance(again.rotary, RotaryConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 4}, r"window=4 and local_layers=\[\] must be given together"),
        ({"local_layers": [0]}, r"window=None and local_layers=\[0\] must be"),
        ({"window": 0, "local_layers": [0]}, "window must be a whole number >= 1"),
        ({"window": 4, "local_layers": [1, 0]}, r"must ascend .* got \[1, 0\]"),
        ({"window": 4, "local_layers": [0, 2]}, "lie below num_layers=2"),
        ({"window": 4, "local_layers": [-1]}, "local_layers must be a whole number"),
        ({"local_rotary": {"theta": 1e4}}, "local_rotary needs model.local_layers"),
        ({"rotary": {"base": 1e4}}, "unknown key 'base' in model.rotary"),
        ({"rotary": 1e4}, "model.rotary must hold its settings, got 10000.0"),
        ({"rotary": None}, "model.rotary must hold its settings, got None"),
        ({"rotary": {"theta": 0}}, "rotary.theta must be a finite number"),
        ({"rotary": {"scaling": "ntk"}}, "rotary.scaling 'ntk' is unknown"),
        ({"rotary": {"factor": 8.0}}, "rotary.factor=8.0 needs a rotary.scaling"),
        (
            {"rotary": {"scaling": "yarn", "factor": 4.0}},
            "'yarn' needs rotary.original_max_positions",
        ),
        (
            {
                "rotary": {
                    "scaling": "llama3",
                    "original_max_positions": 8192,
                    "low_freq_factor": 4.0,
                }
            },
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (
            {"rotary": {"scaling": "factors"}},
            "factors and rotary.scaling='factors' do not belong together",
        ),
        (
            {"rotary": {"factors": [1.0] * 4}},
            "factors and rotary.scaling='none' do not belong together",
        ),
        (
            {"rotary": {"scaling": "factors", "factors": [1.0]}},
            "model.rotary has 1 factors, half of head_dim=",
        ),
        (
            {"rotary": {"scaling": "factors", "factors": [0.0] * 4}},
            "rotary.factors must be a finite number",
        ),
        ({"activation": "relu"}, "activation 'relu' is unknown; choose from silu"),
        ({"attention_soft_cap": 0}, "attention_soft_cap must be a finite number"),
        ({"attention_scale": -1.0}, "attention_scale must be a finite number"),
        ({"qk_norm": "yes"}, "qk_norm must be true or false, got 'yes'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    values = {**dataclasses.asdict(PLAIN), **changes}
    with pytest.raises(UserError, match=message):
        from_mapping(ModelConfig, values, "model")
