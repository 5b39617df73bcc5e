"""convert_checkpoint and widen_checkpoint replace nothing without being told to."""

from __future__ import annotations

import json
import shutil

import pytest

SCRIPT = "convert_checkpoint.py"


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_model_is_replaced_and_another_is_not(
    files, run_script, refuses, tmp_path
):
    """Also one of the same sizes, and one whose folder has the same name."""
    output = tmp_path / "out"
    flags = [f"--output={output}", "--dtype=float32"]
    target = shutil.copytree(files.target, tmp_path / "a" / "model")
    for _ in range(2):
        assert run_script(SCRIPT, f"--input={target}", *flags).code == 0
    before = content(output)
    for other in (files.draft, shutil.copytree(files.draft, tmp_path / "b" / "model")):
        refuses(
            "already holds a model (of model, float32); --overwrite",
            *(
                SCRIPT,
                f"--input={other}",
                *flags,
            ),
        )
    refuses("--overwrite", SCRIPT, f"--input={target}", *flags, "--dtype=bfloat16")
    assert content(output) == before
    assert run_script(SCRIPT, f"--input={files.draft}", *flags, "--overwrite").code == 0
    about = json.loads((output / "metadata.json").read_text())
    assert about["source"] == "draft"


@pytest.mark.parametrize("script", [SCRIPT, "widen_checkpoint.py"])
def test_the_input_is_never_the_output(files, refuses, tmp_path, script):
    """Through a link, from within it, and whatever is allowed to be replaced."""
    model = shutil.copytree(files.target, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = content(model)
    for name in ("model", "link"):
        flags = [f"--input={model}", f"--output={tmp_path / name}", "--overwrite"]
        refuses("would be replaced by --output", script, *flags)
    assert content(model) == before
    if script != SCRIPT:
        given = [f"--input={files.draft}", f"--output={model}"]
        refuses("already holds a model", script, *given)
