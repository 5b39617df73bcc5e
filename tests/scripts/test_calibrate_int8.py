"""scripts/calibrate_int8.py writes what int8 weights are read with."""

from __future__ import annotations

import json
import shutil

import numpy as np

from treespec_jax.checkpoints import describe, int8_scales, load
from treespec_jax.commands.prompts import STORIES

BUNDLED = "treespec_jax/bundled/target"


def test_factors_beside_the_weights(run_script, refuses, tmp_path):
    folder = shutil.copytree(BUNDLED, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(STORIES))
    args = [f"--target={folder}", f"--text={text}", "--window=16", "--tokens=40"]
    result = run_script("calibrate_int8.py", *args)
    assert result.code == 0, result.err
    file = folder / int8_scales.NAME
    assert str(file) in result.err
    with np.load(file) as arrays:
        about = json.loads(str(arrays["about"]))
    assert about["tokens"] == 32 and about["text"] == "text.txt"
    found = int8_scales.read(folder, describe(folder).config)
    assert found.down.any() and load(folder, weights="int8").weights == "int8"
    refuses("smaller --window", "calibrate_int8.py", *args, "--window=4000")
    refuses("--output=FILE", "calibrate_int8.py", *args, f"--output={tmp_path}/no/x")
