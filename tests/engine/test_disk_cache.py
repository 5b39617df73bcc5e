"""Compiled programs are kept on disk, and compiled before they are needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from treespec_jax import disk_cache
from treespec_jax.checkpoints import LoadedModel
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

SIZES = dict(max_batch=1, max_len=64, steps_per_dispatch=2, prefill_chunks=(8, 16))
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def jax_cache():
    """Whatever a test chooses, the choice of the other tests comes back."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def model(tiny_draft):
    dtype = tiny_draft.embedding[...].dtype
    return LoadedModel(tiny_draft.config, tiny_draft, None, "tiny", dtype)


def test_after_a_warm_up_nothing_is_compiled(model, stages):
    llm = LLM(model, speculative=None, **SIZES)
    penalised = SamplingParams(max_tokens=3, presence_penalty=1.0, ignore_eos=True)
    assert llm.warm_up(penalised) > 0
    stages.clear()
    prompts = [[5] * 3, [5] * 16, [5] * 30]
    found = llm.generate(prompts, [PARAMS, penalised, PARAMS]).stats
    assert found.tokens == 15 and found.compile_seconds == 0
    llm.warm_up()
    assert not stages


def test_after_a_warm_up_for_some_settings_too(model, stages):
    """Whichever programs they need, of dispatches and of prefills."""
    llm = LLM(model, speculative=None, **SIZES)
    asked = dict(logprobs=2, prompt_logprobs=1, bad_words=[[3], [4, 5]], min_tokens=1)
    llm.warm_up(asked)
    stages.clear()
    params = SamplingParams(max_tokens=3, ignore_eos=True, **asked)
    assert llm.generate([[5] * 3, [5] * 30], params).stats.compile_seconds == 0
    assert not stages


def test_programs_are_kept_where_asked(model, jax_cache, tmp_path):
    folder = tmp_path / "some" / "folder"
    llm = LLM(model, speculative=None, compilation_cache=folder, **SIZES)
    assert not llm.notes
    llm.warm_up()
    names = {path.name for path in folder.iterdir()}
    assert sum(name.startswith("jit_run") for name in names) >= 1
    # None leaves that alone; another folder takes the place of this one.
    other = tmp_path / "other"
    for choice, used in ((None, folder), (str(other), other)):
        assert disk_cache.use(choice) == ""
        assert jax.config.jax_compilation_cache_dir == str(used)
    jax.jit(lambda x: jnp.sin(x) * 2.25)(jnp.ones(3)).block_until_ready()
    assert list(other.iterdir()) and {p.name for p in folder.iterdir()} == names


def test_the_users_folder_is_the_default(jax_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for choice in (None, True):
        jax.config.update("jax_compilation_cache_dir", None)
        assert disk_cache.use(choice) == ""
        chosen = jax.config.jax_compilation_cache_dir
        assert chosen == str(tmp_path / "treespec-jax")
    for choice in ("", False):
        disk_cache.use(choice)
        assert not jax.config.jax_enable_compilation_cache
        # Who has turned it off gets none by default.
        disk_cache.use(None)
        assert not jax.config.jax_enable_compilation_cache
        disk_cache.use(True)
        assert jax.config.jax_enable_compilation_cache


def test_an_unwritable_folder_is_a_note(model, jax_cache, tmp_path):
    """What was in use stays so, and where nothing was, nothing will be."""
    made = LLM(model, speculative=None, compilation_cache="/dev/null/cache", **SIZES)
    (note,) = made.notes
    assert "/dev/null/cache cannot be written" in note
    assert not jax.config.jax_enable_compilation_cache
    disk_cache.use(tmp_path)
    assert disk_cache.use("/dev/null/cache") == note
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize("choice", [3, ["folder"], b"folder"])
def test_another_kind_of_choice_is_refused(choice, model):
    with pytest.raises(UserError, match="compilation_cache must be a folder"):
        LLM(model, speculative=None, compilation_cache=choice, **SIZES)
