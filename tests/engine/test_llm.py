"""What a user holds: texts in, texts out, over models whose text is known."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from tests.checkpoints.support import train_sentencepiece
from tests.engine.scripted import follow, scripted
from treespec_jax.checkpoints import catalogue
from treespec_jax.checkpoints.tokenizers import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

SIZES = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)
PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def target(scripted_target):
    return scripted_target


@pytest.fixture(scope="module")
def draft(scripted_draft):
    return scripted_draft


@pytest.fixture(scope="module")
def llm(scripted_llm):
    return scripted_llm


@pytest.fixture(scope="module")
def plain(target):
    return LLM(target, speculative=None, **SIZES)


@pytest.fixture(autouse=True)
def _all_pages_come_back(request):
    """Whatever a test does, afterwards nobody holds a page or a place in the queue."""
    yield
    if "llm" in request.fixturenames:
        with request.getfixturevalue("llm").exclusive() as engine:
            assert not engine.busy and engine.free_pages == 2 * 64 // 16


def completing(tokenizer, script, stop) -> int:
    """How many tokens it takes until the text holds `stop`."""
    start = len(tokenizer.decode(script.prompt_ids))
    for count in range(1, len(script.ids) + 1):
        if stop in tokenizer.decode([*script.prompt_ids, *script.ids[:count]])[start:]:
            return count
    raise AssertionError(f"{stop!r} is not in the text")


@pytest.mark.slow
def test_the_script_is_said_with_and_without_speculation(llm, plain, script):
    """Up to the end-of-text token, which leaves no trace in the text."""
    for model in (llm, plain):
        (completion,) = model.generate(script.prompt, PARAMS)
        assert completion.token_ids == script.ids
        assert completion.text == script.text
        assert completion.finish_reason == "stop"
        assert completion.prompt == script.prompt and completion.logprobs is None
        assert completion.prompt_token_ids == script.prompt_ids
    assert llm.generate(script.prompt, PARAMS).stats.tokens_per_step > 1.5


@pytest.mark.slow
def test_prompts_may_be_texts_or_tokens(llm, script):
    """One text, several, token ids, lists of them, numpy arrays, more than slots."""
    ids, text = script.prompt_ids, script.prompt
    for prompts, count in [
        (text, 1),
        ([text], 1),
        (ids, 1),
        (np.array(ids), 1),
        ([ids, text, tuple(ids)], 3),
        ([], 0),
    ]:
        result = llm.generate(prompts, PARAMS)
        assert len(result) == count and result.stats.requests == count
        assert [c.text for c in result] == [script.text] * count
        assert all(result[i].token_ids == script.ids for i in range(count))
    assert llm.generate(text).completions[0].text == script.text


@pytest.mark.slow
@pytest.mark.parametrize("max_steps", [None, 1])
def test_arrivals_tell_when_tokens_reached_the_host(llm, script, max_steps):
    """One dispatch at a time: with one step in each, a step's tokens."""
    for completion in llm.generate([script.prompt] * 3, PARAMS, max_steps):
        assert completion.token_ids == script.ids
        seconds, counts = zip(*completion.arrivals, strict=True)
        assert sum(counts) == len(script.ids) and min(counts) >= 1
        assert seconds[0] > 0 and list(seconds) == sorted(seconds)
        assert completion.first_token_seconds == seconds[0]
        steps = SIZES["steps_per_dispatch"]
        if max_steps is None:
            assert len(counts) == -(-completion.stats.steps // steps)
        else:
            emitted = completion.stats.emitted_counts
            assert [counts.count(n) for n in range(len(emitted))] == emitted


@pytest.mark.slow
def test_each_prompt_has_its_own_params(llm, plain, script):
    params = [
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=5, logprobs=True),
        SamplingParams(max_tokens=45, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=1.5, seed=3, ignore_eos=True),
    ]
    result = llm.generate([script.prompt] * 4, params)
    assert [len(c.token_ids) for c in result] == [3, 5, 45, 30]
    assert [c.finish_reason for c in result] == ["length"] * 4
    assert [c.logprobs and len(c.logprobs) for c in result] == [None, 5, None, None]
    assert result[2].token_ids[: len(script.ids)] == script.ids
    assert result[3].token_ids[: len(script.ids)] != script.ids
    for ours, theirs in zip(
        result, plain.generate([script.prompt] * 4, params), strict=True
    ):
        assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
    assert result.stats.tokens == 3 + 5 + 45 + 30


@pytest.mark.slow
def test_equal_prompts_get_texts_of_their_own(llm, script, capsys):
    """Each by the seed that its completion names; a bar counts them on stderr."""
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True, seed=8)
    result = llm.generate([script.prompt] * 3, params, use_tqdm=True)
    assert [c.seed for c in result] == [8, 9, 10]
    assert len({tuple(c.token_ids) for c in result}) == 3
    shown = capsys.readouterr()
    assert "3/3" in shown.err and "tok/s" in shown.err and not shown.out
    for seed in (9, None):
        one = dataclasses.replace(params, seed=seed)
        (first,) = llm.generate(script.prompt, one)
        if seed == 9:
            assert first.token_ids == result[1].token_ids
        again = dataclasses.replace(params, seed=first.seed)
        assert llm.generate(script.prompt, again)[0].token_ids == first.token_ids
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="use_tqdm must be true or false, got 3"):
        llm.generate(script.prompt, params, use_tqdm=3)


def stops(script):
    """Within a token, over two and three tokens, at the start, behind a byte."""
    text, at = script.text, script.text.index("\u20ac")
    return [text[7:9], text[at - 2 : at + 3], text[2:12], text[:2], "\U0001f600"]


@pytest.mark.slow
@pytest.mark.parametrize("which", range(5))
def test_a_stop_text_ends_the_output_before_it(llm, plain, tokenizer, script, which):
    """The text is cut in front of it, the tokens at the one that completed it."""
    stop = stops(script)[which]
    want = script.text[: script.text.index(stop)]
    count = completing(tokenizer, script, stop)
    params = SamplingParams(max_tokens=40, stop=("never", stop), logprobs=True)
    for model in (llm, plain):
        (completion,) = model.generate(script.prompt, params)
        assert completion.text == want
        assert completion.token_ids == script.ids[:count]
        assert len(completion.logprobs) == completion.stats.tokens == count
        assert sum(completion.stats.emitted_counts) == completion.stats.steps
        assert completion.finish_reason == "stop"
    stream = llm.stream(script.prompt, params)
    assert "".join(stream) == want
    assert stream.completion.token_ids == script.ids[:count]


@pytest.mark.slow
def test_the_first_of_several_stops_counts(llm, script):
    first, second = script.text[6:9], script.text[14:16]
    params = SamplingParams(max_tokens=40, stop=(second, first))
    assert llm.generate(script.prompt, params)[0].text == script.text[:6]


@pytest.mark.slow
def test_a_stop_text_that_never_ends_takes_nothing_away(llm, script):
    """Its start is held back, and given out once it turns out to be plain text."""
    stop = script.text[5:9] + "!"
    params = SamplingParams(max_tokens=40, stop=(stop, script.text[-3:] + "x"))
    stream = llm.stream(script.prompt, params)
    assert "".join(stream) == script.text
    assert stream.completion.text == script.text
    assert stream.completion.finish_reason == "stop"


@pytest.mark.slow
def test_stream_pieces_never_split_a_character(llm, plain, script):
    """They join to the text of generate; the first step is shown alone."""
    for model, first in ((llm, 4), (plain, 1)):
        stream = model.stream(script.prompt, PARAMS)
        assert stream.completion is None
        pieces = list(stream)
        assert pieces and all(pieces)
        arrivals = stream.completion.arrivals
        assert len(arrivals) > 1 and arrivals[0][1] <= first
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == script.text
        assert stream.completion.token_ids == script.ids
        assert next(stream, None) is None


@pytest.mark.slow
def test_a_character_cut_by_the_limit_is_shown_at_the_end_only(llm, script):
    """Two of the four bytes were emitted: the text ends in U+FFFD, not before."""
    smile = script.text.index("\U0001f600")
    count = next(
        n
        for n in range(len(script.ids))
        if llm.tokenizer.token_bytes(script.ids[n]) == b"\xf0"
    )
    params = SamplingParams(max_tokens=count + 2)
    pieces = list(llm.stream(script.prompt, params))
    text = "".join(pieces)
    assert text[:smile] == script.text[:smile] and set(text[smile:]) == {"\ufffd"}
    assert text == llm.generate(script.prompt, params)[0].text


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "forget"])
def test_closing_a_stream_frees_its_slot(llm, script, monkeypatch, end):
    advance, streams = llm.engine.advance, []

    def slow(*args):
        # After two steps nothing goes on before the stream is given up.
        while len(pages) == 2 and not gone.is_set():
            time.sleep(0.001)
        advance(*args)
        pages.append(llm.engine.free_pages)

    pages, gone = [], threading.Event()
    monkeypatch.setattr(llm.engine, "advance", slow)
    streams.append(llm.stream(script.prompt, PARAMS))
    cancel = streams[0]._call.cancel
    monkeypatch.setattr(streams[0]._call, "cancel", lambda: (cancel(), gone.set()))
    piece = next(streams[0])
    assert script.text.startswith(piece)
    if end == "close":
        streams[0].close()
        assert 0 < len(streams[0].completion.token_ids) < len(script.ids)
        assert next(streams[0], None) is None
        streams[0].close()
    else:
        streams.clear()
    with llm.exclusive() as engine:
        assert not engine.busy and engine.free_pages == 8
    assert len(pages) <= 3 and min(pages) < 8


@pytest.mark.slow
def test_streams_and_generate_share_the_engine(llm, script):
    """Two streams in turn, and a generate call between their pieces."""
    first = llm.stream(script.prompt, PARAMS)
    second = llm.stream(script.prompt, SamplingParams(max_tokens=4))
    pieces = [next(first)]
    other = "".join(second)
    assert llm.generate([script.prompt] * 3, PARAMS)[2].text == script.text
    pieces += list(first)
    assert "".join(pieces) == script.text and script.text.startswith(other)


@pytest.mark.slow
def test_empty_text_is_a_prompt_if_a_token_begins_texts(llm, tokenizer, monkeypatch):
    begun = llm.generate("", PARAMS)[0]
    assert begun.prompt == ""
    assert begun.token_ids == llm.generate([[tokenizer.bos_id]], PARAMS)[0].token_ids
    monkeypatch.setattr(tokenizer, "bos_id", None)
    with pytest.raises(UserError, match="the prompt is empty"):
        llm.generate("", PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts, params, message",
    [
        ([[]], None, "the prompt is empty"),
        ([[5], []], None, "the prompt is empty"),
        ([[5] * 64], None, "64 tokens, max_len is 64"),
        ("the cat " * 40, None, "max_len is 64; shorten it"),
        ([[5, 320]], None, "token id 320 is outside the vocabulary of 320"),
        ([[-1]], None, "token id -1 is outside"),
        ([["a"]], None, "text or token ids"),
        ([3.5], None, "text or token ids"),
        (["a", "b"], [PARAMS], "2 prompts but 1 sampling parameters"),
        ("a", [], "1 prompts but 0"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_prompts_are_refused(llm, prompts, params, message):
    """In one line, before anything is queued."""
    with pytest.raises(UserError, match=message) as caught:
        llm.generate(prompts, params)
    assert "\n" not in str(caught.value)
    assert not llm.engine.busy


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number >= 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": float("inf")}, "temperature .* got inf"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, r"top_p .* in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"seed": 2**32}, "seed must be below"),
        ({"seed": -2}, "seed"),
        ({"stop": ("a", "")}, "stop must hold non-empty texts"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_sampling_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculative": {"method": "draft_model"}}, "needs a model; give its path"),
        ({"speculative": {"modle": "x"}}, "unknown key 'modle'.*did you mean 'model'"),
        ({"speculative": {"method": "magic"}}, "method 'magic' is unknown"),
        ({"speculative": {"model": "x", "tree": "regular:0"}}, "'regular:0' is malf"),
        ({"speculative": {"model": "x", "tree": "chain:-1"}}, "'chain:-1' is malf"),
        ({"speculative": {"model": "x", "tree": "chain:1024"}}, "at most 1023 fit"),
        ({"speculative": {"model": "x", "tau": 0}}, "tau"),
        ({"speculative": {"model": "no/such/path"}}, "no drafter at no/such/path"),
        ({"max_len": 97}, "max_len=97 is past the target's 96 positions"),
        ({"max_len": 1}, "max_len must be a whole number >= 2"),
        ({"page_size": 24}, "page_size must be a power of two"),
        ({"max_batch": 0}, "max_batch"),
        ({"num_pages": 0}, "num_pages"),
        ({"prefill_chunks": (16, 8)}, "prefill_chunks must ascend"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_settings_are_refused(target, options, message):
    with pytest.raises(UserError, match=message) as caught:
        LLM(target, **options)
    assert "\n" not in str(caught.value)


def test_bad_models_are_refused():
    with pytest.raises(UserError, match="no checkpoint at no/such/path"):
        LLM("no/such/path")
    with pytest.raises(UserError, match="must be a path or a loaded model, got 7"):
        LLM(7)
    with pytest.raises(UserError, match="tokenizer must be a path or a name, got 7"):
        LLM("no/such/path", tokenizer=7)
    with pytest.raises(UserError, match="no tokenizer at no/such/path"):
        LLM(catalogue.DEFAULT, tokenizer="no/such/path")


def test_a_loaded_model_has_its_tokenizer(target):
    with pytest.raises(UserError, match="loaded has its tokenizer; give its path"):
        LLM(target, tokenizer="no/such/path")


def test_a_pair_needs_one_vocabulary(target, tokenizer, tmp_path_factory):
    """Of one size, and token by token; and the tree must fit max_len."""
    larger = scripted(None, {}, vocab_size=321)
    with pytest.raises(UserError, match="the drafter has 321 tokens, the target 320"):
        LLM(target, speculative={"model": larger})
    other = load_tokenizer(
        train_sentencepiece(
            tmp_path_factory.mktemp("other"),
            sentence_iterator=iter(["quite another text", "xylophone jazz"] * 8),
            vocab_size=280,
            hard_vocab_limit=False,
        )
    )
    stranger = scripted(other, {}, vocab_size=320)
    with pytest.raises(UserError, match="different vocabularies: token"):
        LLM(target, speculative={"model": stranger})
    with pytest.raises(UserError, match="depth 70 does not fit max_len=64"):
        LLM(target, speculative={"model": target, "tree": "chain:70"}, max_len=64)
    short = scripted(tokenizer, {}, max_positions=32)
    with pytest.raises(UserError, match="past the drafter's 32 positions"):
        LLM(target, speculative={"model": short, "tree": "chain:2"}, max_len=64)


@pytest.mark.slow
def test_without_a_tokenizer_tokens_still_work(script):
    """Token ids in and out; text and stop texts are refused."""
    bare = scripted(None, follow([script.prompt_ids[-1], *script.ids]))
    model = LLM(bare, speculative=None, **SIZES)
    (completion,) = model.generate(script.prompt_ids, PARAMS)
    assert completion.token_ids == script.ids and completion.text == ""
    with pytest.raises(UserError, match="has no tokenizer"):
        model.generate("the cat")
    with pytest.raises(UserError, match="stop texts need a tokenizer"):
        model.generate([[5]], SamplingParams(stop="a"))


@pytest.mark.slow
def test_finished_texts_are_handed_over_one_by_one(llm, script, monkeypatch):
    """While others go on; an exception of the caller's ends the whole call."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, 2, 4, 4)]
    advance, turns, handed, seen = llm.engine.advance, [], threading.Event(), []

    def watched(*args):
        turns.append(args)
        # The second text has ended and the first cannot have: four tokens a turn.
        if len(turns) == 7:
            handed.wait(60)
        advance(*args)

    def finished(index, completion):
        seen.append((index, completion.token_ids))
        handed.set()

    monkeypatch.setattr(llm.engine, "advance", watched)
    given = llm.generate([script.prompt] * 4, params, max_steps=1, on_finish=finished)
    assert dict(seen) == {n: one.token_ids for n, one in enumerate(given)}
    assert len(seen) == 4 and handed.is_set() and seen[0][0] != 0

    def fails(index, completion):
        raise KeyError(index)

    with pytest.raises(KeyError):
        llm.generate([script.prompt] * 2, params[:2], on_finish=fails)
