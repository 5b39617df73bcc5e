"""config.json as publishers write it, against what transformers computes with it.

tests/golden/make_configs.py made configs.json with the modules of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from treespec_jax.checkpoints.families import parameter_count
from treespec_jax.checkpoints.formats.huggingface_config import read_config
from treespec_jax.errors import UserError
from treespec_jax.models.rotary import attention_factor, frequencies

FOUND = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "configs.json").read_text("utf-8")
)
# Fields of ModelConfig that golden files name alike.
FIELDS = (
    "head_dim",
    "attention_soft_cap",
    "logit_soft_cap",
    "qkv_bias",
    "qk_norm",
    "norm_eps",
    "tied_embeddings",
    "window",
)


def written(folder, case) -> Path:
    if case.get("ends"):
        ends = {"eos_token_id": case["ends"]}
        (folder / "generation_config.json").write_text(json.dumps(ends))
    path = folder / "config.json"
    path.write_text(json.dumps(case["config"]))
    return path


@pytest.mark.parametrize("name", FOUND["read"])
def test_settings_mean_what_transformers_computes(name, tmp_path):
    case = FOUND["read"][name]
    config, want = read_config(written(tmp_path, case)), case["meaning"]
    for field in FIELDS:
        assert getattr(config, field) == want[field], field
    scale = config.attention_scale or config.head_dim**-0.5
    assert scale == pytest.approx(want["attention_scale"], rel=1e-12)
    assert list(config.local_layers) == want["local_layers"]
    assert config.bos_id == want["begin"]
    ends = dict.fromkeys([*want["ends"], *(case["ends"] or [])])
    assert config.eos_ids == tuple(ends)
    assert parameter_count(config) == want["parameters"]
    # A yarn model may be read further than its config.json says.
    assert config.max_positions >= want["max_positions"]
    yarn = config.rotary.scaling == "yarn"
    assert yarn or config.max_positions == want["max_positions"]


@pytest.mark.parametrize("name", FOUND["read"])
def test_positions_turn_as_fast_as_in_transformers(name, tmp_path):
    case = FOUND["read"][name]
    config, want = read_config(written(tmp_path, case)), case["meaning"]
    assert (config.local_rotary is None) == (want["local_rotary"] is None)
    for ours in ("rotary", "local_rotary"):
        if want[ours] is None:
            continue
        rotary = getattr(config, ours)
        # transformers holds float32; golden files hold 7 digits of it.
        np.testing.assert_allclose(
            frequencies(rotary, config.head_dim), want[ours]["speeds"], rtol=2e-6
        )
        assert attention_factor(rotary) == pytest.approx(want[ours]["factor"])


@pytest.mark.parametrize("name", FOUND["refused"])
def test_what_is_not_supported_is_named_in_one_line(name, tmp_path):
    case = FOUND["refused"][name]
    path = written(tmp_path, case)
    with pytest.raises(UserError) as caught:
        read_config(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    assert case["reason"] in said and "not supported, only" in said
