"""convert_checkpoint of drafters over a target's rows."""

from __future__ import annotations

import numpy as np

from treespec_jax.checkpoints import describe, drafters, load


def medusa_file(folder, config, seed=0):
    """Random heads, as they are published."""
    from safetensors.numpy import save_file

    rng, D = np.random.default_rng(seed), config.embed_dim
    tensors = {
        "0.0.linear.weight": rng.normal(size=(D, D)),
        "0.0.linear.bias": rng.normal(size=D),
        "0.1.weight": rng.normal(size=(config.vocab_size, D)),
    }
    tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return tensors


def test_drafter_is_converted(files, run_script, refuses, tmp_path):
    about = describe(files.target)
    tensors = medusa_file(tmp_path / "in", about.config)
    flags = [f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"]
    refuses("holds a drafter; name its target", "convert_checkpoint.py", *flags)
    done = run_script("convert_checkpoint.py", *flags, f"--target={files.target}")
    assert done.code == 0, done.err
    assert "out: method medusa, float16" in done.out
    target = load(files.target, "float32")
    found = drafters.describe_drafter(tmp_path / "out", target)
    model = drafters.load_drafter(found, target).model
    np.testing.assert_array_equal(model.head[...][0], tensors["0.1.weight"])


def test_input_that_is_no_drafter(files, refuses, tmp_path):
    flags = [f"--input={files.draft}", f"--output={tmp_path / 'out'}"]
    flags.append(f"--target={files.target}")
    refuses("holds no drafter of methods eagle", "convert_checkpoint.py", *flags)


def test_another_drafter_is_not_replaced(files, run_script, refuses, tmp_path):
    """One of the same shape for the same target."""
    config = describe(files.target).config
    for name in ("one", "other"):
        medusa_file(tmp_path / name, config, seed=len(name))
    flags = [f"--target={files.target}", f"--output={tmp_path / 'out'}"]
    for _ in range(2):
        done = run_script(
            "convert_checkpoint.py", f"--input={tmp_path / 'one'}", *flags
        )
        assert done.code == 0, done.err
    other = f"--input={tmp_path / 'other'}"
    refuses("already holds a model (of one", "convert_checkpoint.py", other, *flags)
    same = [f"--input={tmp_path / 'out'}", *flags]
    refuses("would be replaced by --output", "convert_checkpoint.py", *same)
