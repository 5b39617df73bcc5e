"""What one engine recycled and another begins with."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.conftest import TINY
from treespec_jax import limits
from treespec_jax.checkpoints import LoadedModel
from treespec_jax.checkpoints.recycle_table import TableFile
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.drafting import METHODS, recycle
from treespec_jax.engine.executor import Executor
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM
from treespec_jax.speculation import find

SIZES = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)
PROMPTS = [[5, 9, 31], [70, 6]]
PARAMS = SamplingParams(max_tokens=32, ignore_eos=True)


@pytest.fixture(scope="module")
def target(tiny_target):
    return LoadedModel(TINY, tiny_target, None, "tiny", np.dtype("float32"))


def make(target, method="recycle", **speculative) -> LLM:
    speculative = {"method": method, "tree": "chain:3", **speculative}
    return LLM(target, speculative=speculative, **SIZES)


@pytest.fixture(scope="module")
def taught(target):
    """An engine that answered the prompts once, and how that went."""
    llm = make(target, options={"successors": 4})
    return llm, llm.generate(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def saved(taught, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "t.npz"
    assert taught[0].save_recycle_table(path) == path
    return path


def table_of(llm):
    found = recycle.table_of(llm.drafter, llm.engine.draft_state)
    return np.asarray(found.best), np.asarray(found.logits)


@pytest.mark.slow
def test_an_engine_begins_with_what_another_learnt(target, taught, saved):
    """Quicker from the first step on; the texts stay, and nothing compiles again."""
    llm, cold = taught
    fresh = make(target, recycle_table=saved, options={"successors": 4})
    assert not fresh.notes and fresh.recycle_table == saved
    learnt = table_of(llm)
    for ours, theirs in zip(table_of(fresh), learnt, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # The same state in the engine that is compiled.
    llm.engine.draft_state = fresh.engine.draft_state
    warm = llm.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in warm] == [c.token_ids for c in cold]
    assert warm.stats.tokens_per_step > 1.2 * cold.stats.tokens_per_step
    assert llm.engine.compilations == {"begin": 1, "prefill": 1, "dispatch": 1}
    for generation in (warm, cold):
        accepted = generation.stats.accepted
        assert generation.stats.accepted_by_source == {"recycle": accepted}
    # Its state went to the other engine.
    fresh.reset()
    for ours, theirs in zip(table_of(fresh), learnt, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    llm.reset()
    assert llm.generate(PROMPTS, PARAMS).stats.steps == cold.stats.steps


@pytest.mark.slow
def test_a_state_that_a_failure_took_begins_with_the_table_again(
    target, taught, saved, monkeypatch
):
    llm = make(target, recycle_table=saved, options={"successors": 4})
    before = [np.array(x) for x in table_of(llm)]

    def fail(executor, chunk):
        for leaf in jax.tree.leaves(executor._state):
            leaf.delete()
        raise MemoryError("of the device")

    monkeypatch.setattr(Executor, "prefill", fail)
    with pytest.raises(MemoryError, match="of the device"):
        llm.generate(PROMPTS, PARAMS)
    for ours, theirs in zip(table_of(llm), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_table_is_a_function_of_the_texts_alone(target, taught):
    """Idle slots, whatever they said before, teach nothing; twice is the same."""
    llm, found = taught[0], []
    for before in ([[7]], [[40, 3, 2], [11, 12]], [[40, 3, 2], [11, 12]]):
        llm.generate(before, PARAMS)
        empty = make(target, options={"successors": 4})
        llm.engine.draft_state = empty.engine.draft_state
        (completion,) = llm.generate(PROMPTS[:1], PARAMS)
        found.append(table_of(llm))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # All but the last token of the text were looked past.
    said = [*PROMPTS[0], *completion.token_ids[:-1]]
    assert (found[0][1][0, said, 0] > -np.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("method", ["recycle", "auto", "auto with a model"])
def test_other_numbers_of_successors(target, tiny_draft, saved, method, count):
    """Fewer are the best, further ones are unknown; wherever the table stands."""
    more = {"recycle_table": str(saved), "options": {"successors": count}}
    if method == "auto with a model":
        draft = dataclasses.replace(target, config=tiny_draft.config, model=tiny_draft)
        method, more["model"] = "auto", draft
    llm = make(target, method, **more)
    best, logits = table_of(llm)
    assert best.shape == logits.shape == (1, TINY.vocab_size, count)
    shared = min(count, 4)
    written = TableFile(saved, target).read()
    np.testing.assert_array_equal(best[0, :, :shared], written.best[:, :shared])
    np.testing.assert_array_equal(logits[0, :, :shared], written.logits[:, :shared])
    assert (logits[0, :, 4:] == -np.inf).all()


def test_a_table_that_is_not_there_begins_empty(target, tmp_path):
    path = tmp_path / "new.npz"
    llm = make(target, "auto", recycle_table=path)
    assert llm.notes == (f"{path} is not there yet: nothing to recycle at first",)
    assert not path.exists() and (table_of(llm)[1] == -np.inf).all()
    assert llm.save_recycle_table() == path
    assert (TableFile(path, target).read().logits == -np.inf).all()
    assert not make(target, recycle_table=path).notes


@pytest.mark.slow
def test_an_engine_without_a_table_has_nothing_to_save(target, tmp_path, taught):
    for llm in (
        LLM(target, speculative=None, **SIZES),
        make(target, "ngram"),
        make(target, options={"scope": "request"}),
    ):
        with pytest.raises(UserError, match="recycles nothing that outlives a request"):
            llm.save_recycle_table(tmp_path / "t.npz")
    with pytest.raises(UserError, match="no file was named"):
        taught[0].save_recycle_table()
    with pytest.raises(UserError, match="cannot write"):
        taught[0].save_recycle_table(tmp_path / "no" / "t.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "ngram"}, "of no use to method 'ngram'.* recycle or auto"),
        ({"options": {"scope": "request"}}, "scope=request"),
        ({"recycle_table": 3}, "must be a path, got 3"),
    ],
)
def test_a_table_without_use_is_refused(tmp_path, settings, expected):
    """Before anything is read."""
    given = {"method": "recycle", "recycle_table": tmp_path / "t.npz", **settings}
    with pytest.raises(UserError, match=expected) as caught:
        LLM(tmp_path / "no model", speculative=given)
    assert "\n" not in str(caught.value)
    # Plain decoding looks at nothing of this.
    limits.check_speculation(SpeculativeConfig("ngram", tree="none", recycle_table="x"))


@pytest.mark.slow
def test_a_bad_table_is_found_before_weights_are_read(
    target, saved, tmp_path, monkeypatch
):
    (tmp_path / "t.npz").write_text("no table")
    monkeypatch.setattr("treespec_jax.pairs.loaded", lambda *_: pytest.fail("reads"))
    with pytest.raises(UserError, match="t.npz is no recycle table"):
        make(target, recycle_table=tmp_path / "t.npz")
    larger = dataclasses.replace(TINY, vocab_size=98)
    with pytest.raises(UserError, match="successors of 97 tokens, the target has 98"):
        make(dataclasses.replace(target, config=larger), recycle_table=saved)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_a_methods_table(name):
    method = METHODS[name]
    if method.needs_model:
        assert not method.has_table
        return
    cls, options = find(SpeculativeConfig(method=name))
    parts = getattr(cls.make(None, 1.0, options), "parts", ())
    assert method.has_table == any(isinstance(p, recycle.Recycling) for p in parts)
