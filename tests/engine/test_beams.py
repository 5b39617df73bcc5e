"""Beam search against a plain one without cache, and against Hugging Face's."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.drafting import heads
from tests.oracles import full_logits
from treespec_jax import LLM, UserError
from treespec_jax.checkpoints import LoadedModel, load
from treespec_jax.checkpoints.drafters import LoadedDrafter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = dict(max_batch=8, max_len=96, page_size=8, prefill_chunks=(16,))
TOKENS, END = 12, 41
DRAFTERS = {
    "none": None,
    "ngram": dict(method="ngram", tree="regular:2x1x1"),
    "recycle": dict(method="recycle", tree="dynamic:9@3"),
    "draft_model": dict(method="draft_model", tree="dynamic:15@4"),
    "eagle": dict(method="eagle", tree="dynamic:7@3"),
    "medusa": dict(method="medusa", tree="dynamic:7@3"),
}
HEADS = {"eagle": functools.partial(heads.eagle, generation=3), "medusa": heads.medusa}


def loaded(model, **changes) -> LoadedModel:
    config = dataclasses.replace(model.config, **changes)
    return LoadedModel(config, model, None, "tiny", np.dtype("float32"))


@pytest.fixture(scope="module")
def llms(tiny_target, tiny_draft):
    """One per drafter, made when it is first asked for."""

    @functools.cache
    def make(name) -> LLM:
        settings = DRAFTERS[name] and dict(DRAFTERS[name])
        if name == "draft_model":
            settings["model"] = loaded(tiny_draft, eos_ids=(END,))
        if name in HEADS:
            model = HEADS[name](tiny_target)
            dtype = np.dtype("float32")
            settings["model"] = LoadedDrafter(name, model.config, model, name, dtype)
            # Random heads know nothing, which is not the point here.
            settings["check_drafter"] = False
        return LLM(loaded(tiny_target, eos_ids=(END,)), speculative=settings, **SIZES)

    return make


@pytest.fixture(scope="module")
def log_probs(tiny_target):
    """float64 [V], after a text; nothing of it is cached by the model."""

    @functools.cache
    def after(text):
        logits = full_logits(tiny_target, list(text), size=128)[-1].astype(np.float64)
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())

    return after


def plain_search(after, prompt, beams, penalty, early, tokens=TOKENS):
    """Texts and scores, best first: all continuations of all beams, sorted."""
    live, done = [((), 0.0)], []
    for length in range(1, tokens + 1):
        options = [
            ((*text, token), total + log_p)
            for text, total in live
            for token, log_p in enumerate(after((*prompt, *text)))
        ]
        options.sort(key=lambda option: -option[1])
        ended = [o for o in options[:beams] if o[0][-1] == END or length == tokens]
        done += [(text, total / length**penalty) for text, total in ended]
        done = sorted(done, key=lambda one: -one[1])[:beams]
        live = [option for option in options if option[0][-1] != END][:beams]
        if length == tokens or (len(done) == beams and early is True):
            break
        hoped = tokens if early == "never" and penalty > 0 else length
        if len(done) == beams and live[0][1] / hoped**penalty <= done[-1][1]:
            break
    return done


def check(found, wanted):
    assert [tuple(text.token_ids) for text in found] == [text for text, _ in wanted]
    scores = [text.score for text in found]
    np.testing.assert_allclose(scores, [score for _, score in wanted], atol=1e-4)


@pytest.mark.parametrize("drafter", ["none", "ngram", "draft_model"])
def test_finds_what_plain_search_finds(llms, log_probs, ragged_prompts, drafter):
    """Of all prompts at once, for every K; all pages are free afterwards."""
    llm, ends = llms(drafter), 0
    pages = llm.engine.free_pages
    cases = [(1, 1.0, False), (2, 0.5, True), (4, 2.0, "never"), (8, 1.0, False)]
    if drafter != "none":
        cases.append((4, -1.0, False))
    for beams, penalty, early in cases:
        found = llm.beam_search(
            ragged_prompts,
            beams=beams,
            max_tokens=TOKENS,
            length_penalty=penalty,
            early_stopping=early,
            n_best=beams,
        )
        for prompt, texts in zip(ragged_prompts, found, strict=True):
            wanted = plain_search(log_probs, tuple(prompt), beams, penalty, early)
            check(texts, wanted)
            ends += sum(text.finish_reason == "stop" for text in texts)
            assert texts.stats.accepted >= 0
            assert texts.stats.tokens <= TOKENS
        assert llm.engine.free_pages == pages
    assert ends > 10, "hardly any text ends before its last token"


@pytest.mark.parametrize("drafter", list(HEADS))
def test_drafters_over_the_targets_rows_change_no_text(
    llms, log_probs, ragged_prompts, drafter
):
    """Their state follows a beam into the slot where it goes on."""
    llm = llms(drafter)
    pages = llm.engine.free_pages
    for beams in (2, 4):
        settings = dict(beams=beams, max_tokens=TOKENS, n_best=beams)
        found = llm.beam_search(ragged_prompts, **settings)
        for prompt, texts in zip(ragged_prompts, found, strict=True):
            wanted = plain_search(log_probs, tuple(prompt), beams, 1.0, False)
            check(texts, wanted)
        assert found.stats.drafted > 0
        assert llm.engine.free_pages == pages


def test_trees_save_passes(llms, ragged_prompts):
    """A level costs no pass where all new beams were drafted."""
    settings = dict(beams=2, max_tokens=TOKENS)
    plain = llms("none").beam_search(ragged_prompts, **settings).stats
    drafted = llms("draft_model").beam_search(ragged_prompts, **settings).stats
    assert plain.tokens == drafted.tokens == plain.steps
    assert plain.accepted == 0
    assert drafted.steps < 0.9 * plain.steps
    assert drafted.accepted == drafted.tokens - drafted.steps


def test_n_best(llms, ragged_prompts):
    llm = llms("none")
    every = llm.beam_search(ragged_prompts[:2], beams=4, max_tokens=5, n_best=4)
    best = llm.beam_search(ragged_prompts[:2], beams=4, max_tokens=5)
    assert [len(texts) for texts in best] == [1, 1]
    assert [texts[0] for texts in best] == [texts[0] for texts in every]


def test_other_requests_are_as_before(llms, ragged_prompts):
    """A search leaves nothing in the slots that the next request could read."""
    llm = llms("none")
    before = llm.generate(ragged_prompts, dict(max_tokens=9))
    llm.beam_search(ragged_prompts, beams=4, max_tokens=TOKENS)
    after = llm.generate(ragged_prompts, dict(max_tokens=9))
    assert [c.token_ids for c in before] == [c.token_ids for c in after]


def test_text_that_reaches_max_len(llms, log_probs):
    prompt = list(range(3, 93))
    texts = llms("draft_model").beam_search([prompt], beams=4, n_best=4)[0]
    wanted = plain_search(log_probs, tuple(prompt), 4, 1.0, False, tokens=6)
    check(texts, wanted)


def test_mistakes_cost_nothing(llms, ragged_prompts):
    llm = llms("draft_model")
    pages = llm.engine.free_pages
    cases = (
        (dict(beams=9), "beams=9 of 1 prompts take 9 slots; raise max_batch=8"),
        (dict(beams=2, n_best=3), "n_best=3 texts of beams=2"),
        (dict(beams=0), "beams"),
        (dict(early_stopping="no"), "early_stopping must be"),
        (dict(length_penalty=99.0), "length_penalty"),
        (dict(width=3), "width"),
    )
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            llm.beam_search([ragged_prompts[0]], **settings)
    with pytest.raises(UserError):
        llm.beam_search([ragged_prompts[0], []])
    assert llm.engine.free_pages == pages


def test_too_few_pages(tiny_target, log_probs):
    """A clear error, and all pages are free; what fits is found afterwards."""
    sizes = dict(SIZES, num_pages=10)
    llm = LLM(loaded(tiny_target, eos_ids=(END,)), speculative=None, **sizes)
    prompt = tuple(range(3, 20))
    for prompts, tokens in (([[*prompt]], 60), ([[*range(40)], [*range(50, 90)]], 4)):
        with pytest.raises(UserError, match="raise num_pages"):
            llm.beam_search(prompts, beams=4, max_tokens=tokens)
        assert llm.engine.free_pages == 10
    found = llm.beam_search([[*prompt]], beams=2, max_tokens=8, n_best=2)
    check(found[0], plain_search(log_probs, prompt, 2, 1.0, False, tokens=8))


def test_failure_between_the_halves_of_a_pass(llms, ragged_prompts, monkeypatch):
    llm = llms("none")
    wanted = llm.beam_search(ragged_prompts, beams=4, max_tokens=4)
    pages = llm.engine.free_pages

    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("treespec_jax.engine.beams.placed", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        llm.beam_search(ragged_prompts, beams=4, max_tokens=4)
    monkeypatch.undo()
    assert llm.engine.free_pages == pages
    found = llm.beam_search(ragged_prompts, beams=4, max_tokens=4)
    assert [t.texts for t in found] == [t.texts for t in wanted]


def test_equals_hugging_face():
    """In tokens and scores; what earlier searches taught drafts for later ones."""
    golden = json.loads((GOLDEN / "beams.json").read_text())
    made = load(GOLDEN / "llama_grouped")
    config = dataclasses.replace(made.config, eos_ids=tuple(golden["eos_ids"]))
    model = dataclasses.replace(made, config=config)
    sizes = dict(SIZES, max_batch=24)
    llm = LLM(model, speculative=dict(DRAFTERS["recycle"]), **sizes)
    ends = accepted = 0
    for case in golden["cases"]:
        found = llm.beam_search(
            golden["prompts"],
            beams=case["beams"],
            max_tokens=golden["max_tokens"],
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            n_best=case["beams"],
        )
        accepted += found.stats.accepted
        for texts, wanted in zip(found, case["found"], strict=True):
            assert [text.token_ids for text in texts] == wanted["texts"], case
            ends += sum(text.finish_reason == "stop" for text in texts)
            if wanted["scores"] is not None:
                scores = [text.score for text in texts]
                np.testing.assert_allclose(scores, wanted["scores"], atol=1e-4)
    assert ends > 100
    assert accepted > 100
