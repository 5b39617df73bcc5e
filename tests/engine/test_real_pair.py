"""Two small models that others trained, a real pair: known text, known acceptance."""

import pathlib

import pytest

from treespec_jax import LLM, SamplingParams

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "weights"
OPENINGS = [
    "Once upon a time, there was a little",
    "One day, a girl named Lily went to",
    "Tom had a red ball. He liked to",
    "There was a big tree in the forest. A",
    "Sara and Ben were best friends. They",
    "The little cat was very hungry, so",
    "It was a sunny day. Max wanted to",
    "A kind old man had a small",
    "Once there was a boy who loved to",
    "Lily and her mom went to the park.",
    "One night, the moon was very bright and",
    "Mia had a doll. She took it",
    "In the garden there was a small",
    "The dog saw a bird and",
    "Once upon a time, a bear lived in",
    "Ben wanted to make a cake for",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("optimised_programs"),
    pytest.mark.skipif(not SHARED.is_dir(), reason="real checkpoints are not here"),
]


@pytest.mark.parametrize(
    ("tree", "known"), [("chain:3", 2.36), ("chain:5", 2.73), ("regular:3x2x1", 2.99)]
)
def test_tokens_per_step(tree, known):
    """As another implementation measured on 16 other openings of 128 greedy tokens."""
    llm = LLM(
        SHARED / "stories260K.bin",
        speculative={"model": SHARED / "llama2xs_281K.bin", "tree": tree},
        max_batch=16,
        max_len=160,
        page_size=32,
        prefill_chunks=(16,),
    )
    params = SamplingParams(max_tokens=128, ignore_eos=True)
    generation = llm.generate(OPENINGS, params)
    assert all(len(completion.token_ids) == 128 for completion in generation)
    found = generation.stats.tokens_per_step
    print(f"{tree}: {found:.2f} tokens per step, known {known}")
    assert abs(found - known) < 0.15
    begun = llm.generate("", SamplingParams(max_tokens=32))[0].text
    assert begun.startswith("Once upon a time, there was a little girl named Lily.")
