"""treespec train_drafter: from a target's own texts to a drafter that is used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import treespec_jax
from treespec_jax import LLM, SamplingParams, UserError, checkpoints
from treespec_jax.checkpoints.drafters import LoadedDrafter

SIZES = ("--max_tokens=40", "--page_size=8", "--steps_per_dispatch=4")
# A tiny run; all other settings are the usual ones.
SETTINGS = {
    "data.row_tokens": 16,
    "data.batch_rows": 2,
    "data.micro_rows": 2,
    "data.held_out": 0.2,
    "objective.predictions": 3,
    "optimizer.warmup": 1,
    "optimizer.decay": 2,
    "run.eval_rows": 2,
    "run.progress": False,
}
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
ENGINE = dict(max_batch=2, max_len=64, page_size=16, prefill_chunks=(8,))
PROMPTS = ["a dog and a cat", "so"]


def tokens(target, speculative) -> list[list[int]]:
    llm = LLM(target, speculative=speculative, **ENGINE)
    return [done.token_ids for done in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def plain(files):
    return tokens(files.target, None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder that the first test fills."""
    return tmp_path_factory.mktemp("texts") / "stories"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle3", "medusa", "draft_model"])
def test_from_texts_to_a_drafter(
    method, run_script, refuses, files, plain, texts, tmp_path
):
    if not texts.exists():
        given = f"--target={files.target}", "--stories=8", f"--output={texts}"
        assert run_script("generate_answers", *given, *SIZES).code == 0
    given = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    given += [f"--method={method}", f"--target={files.target}", "--steps=6"]
    given += [f"--data={texts}", f"--output={tmp_path / 'run'}"]
    told = run_script("train_drafter", *given)
    assert told.code == 0, told
    assert "192 tokens in 6 steps, " in told.out
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert cost["method"] == method and cost["target"] == files.target
    path = Path(told.out.strip().splitlines()[-1].removeprefix("drafter: "))
    assert path == tmp_path / "run" / "drafter"
    # Six steps teach too little for the check of its wiring.
    taken = {"model": path, "tree": "regular:2x1", "check_drafter": False}
    assert tokens(files.target, taken) == plain
    refuses("holds a run with seed=0, not 7", "train_drafter", *given,
            "--config.seed=7")  # fmt: skip


def test_mistakes_are_one_line(refuses, files, tmp_path):
    given = ["train_drafter", f"--target={files.target}", f"--output={tmp_path / 'r'}"]
    refuses("nothing to train on: give --data=FOLDER", *given)
    refuses("holds no texts of generate_answers", *given, f"--data={tmp_path}")
    refuses("cannot read none.txt", *given, "--text=none.txt")
    refuses("--method", *given, "--text=none.txt", "--method=hydra")
    (tmp_path / "tale.txt").write_text("a dog\n" * 4)
    refuses("leave no row of 256 tokens", *given, f"--text={tmp_path / 'tale.txt'}")


@pytest.mark.slow
def test_heads_from_python(files, plain, tmp_path):
    """From plain texts, and a second call that goes on from what the first wrote."""
    tales = [f"a dog and a cat number {i} went home" for i in range(30)]
    given = dict(
        num_heads=2,
        training_data=tales,
        epochs=2,
        output=tmp_path / "run",
        data={"row_tokens": 32},
        run={"progress": False},
    )
    heads = treespec_jax.train_medusa_heads(files.target, **given)
    assert isinstance(heads, LoadedDrafter) and heads.config.heads == 2
    chain = {"tree": "chain:2"}
    assert tokens(files.target, {"model": heads, **chain}) == plain
    stored = tmp_path / "run" / "drafter"
    assert tokens(files.target, {"model": stored, **chain}) == plain
    again = treespec_jax.train_medusa_heads(files.target, **given)
    np.testing.assert_array_equal(again.model.weight[...], heads.model.weight[...])


@pytest.mark.slow
def test_a_layer_for_a_loaded_target(files, plain, tmp_path):
    target = checkpoints.load(files.target)
    (tmp_path / "tale.txt").write_text("a dog and a cat went home. " * 40)
    layer = treespec_jax.train_eagle(
        target,
        1,
        tmp_path / "tale.txt",
        run={"progress": False},
        objective={"predictions": 2},
        data={"row_tokens": 32, "separator": r"\. "},
    )
    assert (layer.method, layer.config.generation) == ("eagle", 1)
    assert layer.model.embedding[...] is target.model.embedding[...]
    taken = {"model": layer, "tree": "chain:2", "check_drafter": False}
    assert tokens(target, taken) == plain


def test_python_mistakes_are_one_line(files):
    def fails(words, function, *args, **more):
        with pytest.raises(UserError, match=words) as caught:
            function(*args, **more)
        assert "\n" not in str(caught.value)

    heads, layer = treespec_jax.train_medusa_heads, treespec_jax.train_eagle
    fails("training_data must be texts, a text file or a folder", heads, files.target)
    fails("cannot read nowhere", heads, files.target, 2, "nowhere")
    fails("has no tokenizer to read texts with", heads, files.bare, 2, ["a"])
    fails("generation must be 1 or 3, got 2", layer, files.target, 2, ["a"])
    fails("leave no row of", heads, files.target, 2, ["a", "b"])
    many = ["a dog went home"] * 300
    fails("unknown key 'hats' in drafter", heads, files.target, 2, many,
          drafter={"hats": 1})  # fmt: skip
