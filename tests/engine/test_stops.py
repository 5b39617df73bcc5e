"""Where a text ends: stop texts, control tokens in them, and tokens that end it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.stops import StoppedText
from treespec_jax.texts import Reader

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
# `CHATML` spells its control tokens so; they are emitted as one token each.
START, END = "<|start|>", "<|end|>"


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(GOLDEN / "qwen")


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(GOLDEN / "llama2")


class Tokens(Request):
    """Has tokens and no steps that emitted them."""

    def cut(self, tokens: int) -> None:
        del self.tokens[tokens:]


def read(tokenizer, ids, **params):
    """The completion of a request that emits `ids` in turn, and the pieces taken."""
    request = Tokens([1], SamplingParams(max_tokens=len(ids), **params))
    reader = Reader("", request, tokenizer, ())
    engine = SimpleNamespace(cancel=lambda request: None)
    pieces = []
    for token in ids:
        request.tokens.append(token)
        if len(request.tokens) == len(ids):
            request.finish_reason = "length"
        reader.read(engine)
        pieces.append(reader.take())
        if request.finish_reason is not None:
            break
    completion = reader.completion()
    assert "".join(pieces) == completion.text
    return completion


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        (f"the cat{END} sat", END, "the cat"),
        (f"the cat{END} sat", f"cat{END}", "the "),
        (f"the cat{END} sat", f"{END} sat", "the cat"),
        (f"the cat{END} sat", f"t{END} s", "the ca"),
        (f"the cat{END}{START} sat", END + START, "the cat"),
        (f"the cat{START} sat{END}{START} on", END + START, "the cat sat"),
        # The text of "end" is not in what is shown.
        (f"the cat{END} sat", "end", "the cat sat"),
        (f"the cat{START}{END} sat", ("end", START), "the cat"),
        (f"the cat{END} sat", "<|end", "the cat sat"),
        # A control token that no stop text mentions leaves no trace.
        (f"the ca{START}t sat", "cat", "the "),
        (f"the ca{START}t{END} sat", f"cat{END}", "the "),
        (f"the cat{END} sat", ("sat", f"cat{END}"), "the "),
    ],
)
def test_control_tokens_in_stop_texts(qwen, text, stop, shown):
    ids = qwen.encode(text)
    completion = read(qwen, ids, stop=stop)
    assert completion.text == shown
    cut = shown != qwen.decode(ids)
    assert completion.finish_reason == ("stop" if cut else "length")


def test_the_token_that_completes_the_stop_is_the_last(qwen, llama):
    for tokenizer, end in ((qwen, END), (llama, "</s>")):
        ids = tokenizer.encode(f"the cat{end} sat", add_bos=False)
        found = read(tokenizer, ids, stop=(end,))
        control = tokenizer.encode(end, add_bos=False)[-1]
        assert found.token_ids == ids[: ids.index(control) + 1]
        assert found.text == "the cat"


def test_a_spelling_in_plain_tokens_stops_too(qwen):
    """As a model that was not trained with the token writes it."""
    letters = [i for c in END for i in qwen.encode(c, add_bos=False)]
    assert len(letters) == len(END)
    ids = [*qwen.encode("the cat"), *letters, *qwen.encode(" sat")]
    assert read(qwen, ids, stop=END).text == "the cat"


def test_nothing_is_shown_that_a_stop_text_may_take_back(qwen):
    ids = qwen.encode(f"the cat{END} s")
    text = StoppedText(qwen, (), (f"cat{END} sat",))
    shown = []
    for token in ids:
        text.push(token)
        shown.append(text.text[: text.certain()])
    assert shown[-1] == "the "
    text.end()
    assert text.text[: text.certain()] == "the cat s" and not text.stopped


@pytest.mark.parametrize("first", range(1, 6))
def test_a_stop_is_found_from_its_first_letter(qwen, first):
    """However many letters of it the last token brings, with others before and after.

    It is as long as a stop text gets, so that the search may begin no later.
    """
    stop = "abcabd"
    for before in ("", "x", "ab", "abc"):
        text = before + stop + "y"
        cut = len(before) + first
        ids = [i for part in (text[:cut], text[cut:]) for i in qwen.encode(part)]
        letters = [i for letter in text for i in qwen.encode(letter)]
        for pieces in (ids, letters):
            assert qwen.decode(pieces) == text
            for stops in (stop, (stop, "d", "zzzzzz")):
                assert read(qwen, pieces, stop=stops).text == before


def test_rows_without_a_token_are_no_stop(qwen):
    ids = [*qwen.encode("the"), qwen.vocab_size + 3, *qwen.encode(" cat")]
    assert read(qwen, ids, stop="x").text == "the cat"


def test_tokens_that_end_the_output(qwen):
    ids = qwen.encode("the cat sat")
    found = read(qwen, ids, stop_token_ids=[ids[-1]])
    assert (found.finish_reason, found.token_ids) == ("stop", ids)
    assert found.text == qwen.decode(ids[:-1])
    # Without a tokenizer too; whichever stop comes first counts.
    assert read(None, ids, stop_token_ids=[ids[1]]).token_ids == ids[:2]
    both = dict(stop=qwen.decode(ids[:1]), stop_token_ids=ids[1:])
    assert read(qwen, ids, **both).token_ids == ids[:1]


def test_the_stop_may_stay(qwen):
    """Whichever was completed first, as it is spelt; also that of a token."""
    ids = qwen.encode(f"the cat{END} sat")
    for stop, shown in [
        ("cat", "the cat"),
        (["ca", "cat"], "the ca"),
        (["e c", "the ca"], "the c"),
        (END, f"the cat{END}"),
        (f"t{END} s", f"the cat{END} s"),
    ]:
        found = read(qwen, ids, stop=stop, include_stop_str_in_output=True)
        assert (found.text, found.finish_reason) == (shown, "stop")
    kept = read(qwen, ids, stop_token_ids=ids[-1:], include_stop_str_in_output=True)
    assert (kept.text, kept.finish_reason) == (qwen.decode(ids), "stop")


def test_a_short_text_does_not_stop(qwen):
    """A stop text that the first tokens complete is passed over, the next is not."""
    text = "a cat, a cat, a cat"
    ids = qwen.encode(text)
    completed = [
        n for n in range(1, len(ids) + 1) if qwen.decode(ids[:n])[-3:] == "cat"
    ]
    for count in range(len(ids) + 1):
        found = read(qwen, ids, stop="cat", min_tokens=count)
        later = sum(n <= count for n in completed)
        assert found.text == (text if later == 3 else "a cat, " * later + "a ")
        ends = completed[later] if later < 3 else len(ids)
        assert len(found.token_ids) == ends
    ends = read(qwen, ids, stop_token_ids=ids[:1], min_tokens=len(ids))
    assert ends.finish_reason == "length" and ends.token_ids == ids


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stops_end_where_a_search_of_the_whole_text_finds_them(qwen, data):
    """A stop text may begin in any earlier piece, and its last letter in the last."""
    pieces = ["the", " cat", "a", "b", "é", "😀", END, START]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    stop = "".join(data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3)))
    ids = qwen.encode(text)
    for control in (START, END):
        if control not in stop:
            text = text.replace(control, "")
    want = text.partition(stop)[0].replace(START, "").replace(END, "")
    if ids:
        assert read(qwen, ids, stop=stop).text == want


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(stop=5), "stop must hold non-empty texts, got 5"),
        (dict(stop=b"end"), "stop must hold non-empty texts, got b'end'"),
        (dict(stop=["a", 3]), "stop must hold non-empty texts"),
        (dict(stop="a\ud800"), r"stop holds '\\ud800', which is no"),
        (dict(stop_token_ids=["2"]), "stop_token_ids must be a whole number"),
        (dict(stop_token_ids=[True]), "stop_token_ids must be a whole number"),
        (dict(stop_token_ids=-1), "stop_token_ids must be a whole number >= 0, got -1"),
    ],
)
def test_stops_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


def test_ways_to_give_stops():
    import numpy as np

    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    found = SamplingParams(stop=["a", "b"], stop_token_ids=np.arange(2, dtype=np.int32))
    assert (found.stop, found.stop_token_ids) == (("a", "b"), (0, 1))
    assert all(type(token) is int for token in found.stop_token_ids)
    assert SamplingParams(stop_token_ids=np.int64(7)).stop_token_ids == (7,)
