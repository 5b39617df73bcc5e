"""The bundled pair: losslessness and usefulness of what the demo runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import treespec_jax
from tests.oracles import Ties
from treespec_jax.checkpoints import load
from treespec_jax.commands.prompts import STORIES
from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM

BUNDLED = Path(treespec_jax.__file__).parent / "bundled"
TOKENS = 48
SETTINGS = {
    "greedy": SamplingParams(max_tokens=TOKENS, ignore_eos=True),
    "t0.3": SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.3),
    "t0.7 top_p": SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, temperature=0.7, top_p=0.9
    ),
    "t1.0 top_k": SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, temperature=1.0, top_k=40
    ),
}
# A short, a long, and three ordinary prompts.
PROMPTS = ["the", *STORIES[:3], " ".join(STORIES)]
COMMON_WORDS = set(
    re.findall(
        r"\S+",
        """the a and to was he she it they her his you i of in with that said had so is
        day not for on were very but he's play saw big little wanted mom them then
        happy at one there do all like be up me my we asked can""",
    )
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised_programs")]


@pytest.fixture(scope="module")
def pair():
    return load(BUNDLED / "target", "float32"), load(BUNDLED / "draft", "float32")


def generate(llm, name):
    params = [dataclasses.replace(SETTINGS[name], seed=i) for i in range(len(PROMPTS))]
    return llm.generate(PROMPTS, params), params


@pytest.fixture(scope="module")
def plain(pair):
    """Plain decoding, one prompt at a time."""
    llm = LLM(pair[0], speculative=None, max_batch=1, max_len=384)
    return {name: generate(llm, name)[0] for name in SETTINGS}


@pytest.mark.parametrize(
    ("tree", "batch", "page", "steps"),
    [
        ("chain:5", 5, 16, 8),
        ("dynamic:15@5", 5, 16, 1),
        ("dynamic:7@4", 1, 64, 8),
    ],
)
def test_tokens_equal_plain_decoding(pair, plain, tree, batch, page, steps, capsys):
    target, draft = pair
    llm = LLM(
        target,
        speculative=dict(method="draft_model", model=draft, tree=tree),
        max_batch=batch,
        max_len=384,
        page_size=page,
        steps_per_dispatch=steps,
    )
    ties = Ties(target.model)
    speeds = {}
    for name in SETTINGS:
        generation, params = generate(llm, name)
        speeds[name] = generation.stats.tokens_per_step
        for i, completion in enumerate(generation):
            prompt = target.tokenizer.encode(PROMPTS[i])
            ties.check(
                prompt, plain[name][i].token_ids, completion.token_ids, params[i]
            )
            if completion.token_ids == plain[name][i].token_ids:
                assert completion.text == plain[name][i].text
    with capsys.disabled():
        shown = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
        print(
            f"\n{tree}: {ties.seen} near ties in {ties.tokens} tokens; "
            f"tokens per step: {shown}"
        )
    assert speeds["greedy"] > 1.8, "the bundled drafter has stopped agreeing"


def test_it_writes_words(plain):
    """Recognisable sentences: many words are those that any story uses."""
    text = " ".join(completion.text for completion in plain["greedy"])
    words = [word.strip(".,!?\"'") for word in text.lower().split()]
    assert len(words) > 100
    assert sum(word in COMMON_WORDS for word in words) > 0.4 * len(words)
