"""Bad words as tokens: where a word comes about in a text, its tokens do."""

from __future__ import annotations

from pathlib import Path

import pytest

from treespec_jax.arguments import with_token_ids
from treespec_jax.checkpoints.tokenizers import load_tokenizer, spellings
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def within(ids, word) -> bool:
    size = len(word)
    return any(tuple(ids[i : i + size]) == word for i in range(len(ids) - size + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_word_is_found_wherever_it_stands_alone(name):
    tokenizer = load_tokenizer(GOLDEN / name)
    for word in ("cat", "the cat", "Zürich", "日本"):
        found = spellings(tokenizer, word)
        assert found and all(found) and spellings(tokenizer, f" {word}") == found
        texts = [word, f"a {word}", f"a\n{word}", f"{word}\nb"]
        # Tokens of this one run from a word into the space behind it.
        texts += [f"a {word} b"] if name != "smollm" else []
        for text in texts:
            ids = tokenizer.encode(text, add_bos=False)
            assert any(within(ids, one) for one in found), (word, text)
        ids = tokenizer.encode("a dog sat", add_bos=False)
        assert not any(within(ids, one) for one in found)
        # None is the end of another one, which would forbid it already.
        for one in found:
            assert not any(one != two and one[-len(two) :] == two for two in found)
    params = with_token_ids(SamplingParams(bad_words=["cat", "cat", [3]]), tokenizer)
    assert params.bad_words == (*spellings(tokenizer, "cat"), (3,))


class Nothing:
    """A tokenizer that knows no letter."""

    def encode(self, text, add_bos):
        return []


def test_a_word_without_tokens_is_refused():
    with pytest.raises(UserError, match="the tokenizer has no token for 'x'"):
        spellings(Nothing(), "x")
