"""Drafters over a target's rows as checkpoints of the package's own."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.drafter_files import (
    IDS,
    eagle_config,
    loaded,
    medusa_config,
    random_drafter,
)
from tests.checkpoints.support import same_parameters
from treespec_jax import LLM
from treespec_jax.checkpoints import calibration, catalogue, describe, drafters, load
from treespec_jax.checkpoints.catalogue import Model
from treespec_jax.commands import benchmark_job, loading, settings
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer

KINDS = {
    "eagle3": eagle_config(),
    "eagle1": eagle_config(1, few=False, input_norm=True, fc_bias=True),
    "own": eagle_config(3, shared_head=False, norm_before_fc="each"),
    "medusa": medusa_config(),
    "medusa_own": medusa_config(few=False, shared_head=False),
    "medusa_full": medusa_config(few=False),
    "medusa_root": medusa_config(reads_root=True),
}


@pytest.fixture(scope="module")
def target(tiny_target):
    return loaded(tiny_target)


@pytest.fixture(scope="module")
def stored(target, tmp_path_factory):
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("drafters")
    for name, config in KINDS.items():
        model = random_drafter(config, target.model)
        drafters.save(model, folder / name, target=target, dtype="float32")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_loaded(name, target, stored):
    config = KINDS[name]
    about = drafters.describe_drafter(stored / name, target)
    assert about.config == config
    assert about.method == ("medusa" if "medusa" in name else "eagle")
    found = drafters.load_drafter(about, target).model
    wanted = random_drafter(config, target.model)
    assert same_parameters(found, wanted)
    if config.reduced:
        assert found.token_ids[...].dtype == jnp.int32
        assert found.token_ids[...].tolist() == IDS.tolist()


def test_what_is_the_targets_is_neither_stored_nor_copied(target, stored):
    for name in ("eagle1", "medusa_full"):
        about = drafters.describe_drafter(stored / name, target)
        found = drafters.load_drafter(about, target).model
        assert found.head[...] is target.model.head[...]
    about = drafters.describe_drafter(stored / "eagle3", target)
    found = drafters.load_drafter(about, target).model
    assert found.embedding[...] is target.model.embedding[...]
    shapes = about.open().source.shapes()
    assert not {"embedding", "head"} & set(shapes)
    assert (
        "head"
        in drafters.describe_drafter(stored / "own", target).open().source.shapes()
    )


def test_token_ids_are_stored_without_loss_in_bfloat16(tiny_target, tmp_path):
    """bfloat16 would round all numbers above 256."""
    sizes = dataclasses.replace(tiny_target.config, vocab_size=5000)
    big = loaded(type(tiny_target)(sizes, rngs=nnx.Rngs(0)))
    config = medusa_config(target_vocab=5000)
    model = random_drafter(medusa_config(), tiny_target)
    wanted = 4000 + 3 * np.arange(len(IDS))
    model.config = config
    model.token_ids[...] = jnp.asarray(wanted, jnp.int32)
    drafters.save(model, tmp_path / "big", target=big)
    about = drafters.describe_drafter(tmp_path / "big", big)
    found = drafters.load_drafter(about, big).model
    assert found.token_ids[...].tolist() == wanted.tolist()
    head = big.model.head[...][wanted]
    np.testing.assert_array_equal(found.head[...], head)


def test_drafters_take_the_dtype_of_their_target(tiny_target, target, stored):
    dtype = jnp.bfloat16
    model = Transformer(target.config, dtype=dtype, rngs=nnx.Rngs(0))
    half = dataclasses.replace(target, model=model, dtype=np.dtype(dtype))
    about = drafters.describe_drafter(stored / "own", half)
    found = drafters.load_drafter(about, half)
    assert found.model.fc[...].dtype == jnp.bfloat16 == found.dtype


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 96, "vocab_size=97; this target has vocab_size=96"),
        ("embed_dim", 64, "embed_dim=32; this target has embed_dim=64"),
        ("num_layers", 3, "num_layers=2; this target has num_layers=3"),
    ],
)
def test_another_target_is_refused(key, value, message, target, stored):
    config = dataclasses.replace(target.config, **{key: value})
    other = dataclasses.replace(target, config=config)
    with pytest.raises(UserError, match=message):
        drafters.describe_drafter(stored / "eagle3", other)


class Words:
    """As much of a tokenizer as tells vocabularies apart."""

    def __init__(self, first="a"):
        self.first, self.vocab_size = first, 97

    def piece(self, token):
        return f"{self.first}{token}"


def test_another_vocabulary_of_that_size_is_refused(target, tmp_path):
    ours = dataclasses.replace(target, tokenizer=Words())
    drafters.save(
        random_drafter(KINDS["medusa"], target.model), tmp_path / "d", target=ours
    )
    drafters.describe_drafter(tmp_path / "d", ours)
    drafters.describe_drafter(tmp_path / "d", target)
    theirs = dataclasses.replace(target, tokenizer=Words("b"))
    with pytest.raises(UserError, match="drafts for tiny, whose tokens are others"):
        drafters.describe_drafter(tmp_path / "d", theirs)


def change(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9 is not known here, only 1"),
        ({"method": "hydra"}, "method 'hydra' is unknown"),
        ({"config": None}, "lacks 'config'"),
        ({"target": 3}, "lacks 'target'"),
        ({"config": {"heads": 3}}, "config lacks 'blocks'"),
        ({"files": {}}, "lacks 'files'"),
    ],
)
def test_damaged_metadata(changes, message, target, tmp_path):
    model = random_drafter(KINDS["medusa"], target.model)
    drafters.save(model, tmp_path / "d", target=target)
    change(tmp_path / "d", **changes)
    with pytest.raises(UserError, match=message):
        drafters.load_drafter(drafters.describe_drafter(tmp_path / "d", target), target)


def test_damaged_tokens(target, tmp_path):
    model = random_drafter(KINDS["medusa"], target.model)
    model.token_ids[...] = model.token_ids[...].at[3].set(0)
    drafters.save(model, tmp_path / "d", target=target)
    about = drafters.describe_drafter(tmp_path / "d", target)
    with pytest.raises(UserError, match="must ascend within the target's 97"):
        drafters.load_drafter(about, target)


def test_drafter_that_is_not_finite_is_not_stored(target, tmp_path):
    model = random_drafter(KINDS["medusa"], target.model)
    model.bias[...] = model.bias[...].at[0].set(jnp.nan)
    with pytest.raises(UserError, match="tensor bias holds NaN"):
        drafters.save(model, tmp_path / "d", target=target)
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_overwritten(target, tmp_path):
    from treespec_jax.checkpoints import save

    save(target, tmp_path / "model")
    model = random_drafter(KINDS["medusa"], target.model)
    with pytest.raises(UserError, match="is not empty and not a converted"):
        drafters.save(model, tmp_path / "model", target=target)


def test_drafter_as_target_is_refused(stored):
    with pytest.raises(UserError, match="a drafter of method 'eagle', which cannot"):
        describe(stored / "eagle3")
    with pytest.raises(UserError, match="name it as the drafter, with --draft"):
        LLM(stored / "medusa")


# ---- whole programs


GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 9, 33], [7, 7, 2, 60]]
# They guess nothing, and would be refused.
RANDOM = {"check_drafter": False}
SIZES = dict(max_batch=2, max_len=64, page_size=16, prefill_chunks=(8,))


@pytest.fixture(scope="module")
def plain(target):
    llm = LLM(target, speculative=None, **SIZES)
    return [c.token_ids for c in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
def test_folder_drafts_and_names_its_method(name, target, stored, plain):
    (stored / name / calibration.NAME).write_text('{"tau": 0.9}')
    speculative = RANDOM | {"model": stored / name, "tree": "chain:2"}
    llm = LLM(target, speculative=speculative, **SIZES)
    assert llm.drafter.sources == (("medusa",) if name == "medusa" else ("eagle",))
    assert llm.drafter.tau == 0.9
    assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == plain


def test_loaded_drafter_is_taken(target, stored, plain):
    about = drafters.describe_drafter(stored / "eagle3", target)
    draft = drafters.load_drafter(about, target)
    speculative = RANDOM | {"model": draft, "tree": "chain:2"}
    llm = LLM(target, speculative=speculative, **SIZES)
    assert [c.token_ids for c in llm.generate(PROMPTS, GREEDY)] == plain
    config = dataclasses.replace(target.config, vocab_size=96)
    other = dataclasses.replace(target, config=config)
    with pytest.raises(UserError, match="for a target of tokens 97, this one has 96"):
        LLM(other, speculative={"model": draft}, **SIZES)


@pytest.mark.parametrize("method", ["medusa", "draft_model", "recycle"])
def test_method_that_contradicts_the_folder(method, target, stored):
    with pytest.raises(UserError, match=f"a drafter of method 'eagle', not '{method}'"):
        LLM(target, speculative={"model": stored / "eagle3", "method": method})


def test_auto_takes_a_layer_but_no_heads(target, stored):
    chosen = SpeculativeConfig("auto", stored / "eagle3")
    assert drafters.choose(target, chosen) == chosen
    with pytest.raises(UserError, match="a drafter of method 'medusa', not 'auto'"):
        drafters.choose(target, SpeculativeConfig("auto", stored / "medusa"))


def test_model_that_is_no_drafter(target, tmp_path):
    from treespec_jax.checkpoints import save

    save(target, tmp_path / "model")
    with pytest.raises(UserError, match="model holds no drafter of method 'eagle'"):
        LLM(target, speculative={"model": tmp_path / "model", "method": "eagle"})
    loaded_one = load(tmp_path / "model")
    with pytest.raises(UserError, match="model holds no drafter of method 'medusa'"):
        LLM(target, speculative={"model": loaded_one, "method": "medusa"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_layers": [2, 1]}, "feature_layers must ascend"),
        ({"feature_layers": 3}, "must be a list of layer numbers, got 3"),
        ({"feature_layers": [0, 1, 9]}, "is past the target's 2 layers"),
        ({"norm_before_residual": 1}, "norm_before_residual must be true or false"),
        ({"layers": [1]}, "unknown key 'layers'"),
    ],
)
def test_options_that_cannot_be(options, message, target, stored):
    speculative = {"model": stored / "eagle3", "options": options}
    with pytest.raises(UserError, match=message):
        LLM(target, speculative=speculative)


def test_options_win_over_the_folder(target, stored):
    said = {"norm_before_residual": True}
    about = drafters.describe_drafter(stored / "eagle3", target, said)
    assert about.config == dataclasses.replace(
        KINDS["eagle3"], norm_before_residual=True
    )


def test_texts_longer_than_a_drafter_knows(target, tmp_path):
    layer = dataclasses.replace(KINDS["eagle3"].layer, max_positions=32)
    config = dataclasses.replace(KINDS["eagle3"], layer=layer)
    model = random_drafter(config, target.model)
    drafters.save(model, tmp_path / "short", target=target)
    llm = LLM(target, speculative=RANDOM | {"model": tmp_path / "short"})
    assert llm.engine.config.max_len == 256
    assert any("short was trained for 32 positions" in note for note in llm.notes)


@pytest.fixture
def catalogued(target, stored, tmp_path, monkeypatch):
    """A target of the catalogue with several drafters."""
    from treespec_jax.checkpoints import save

    save(target, tmp_path / "talker")
    models = [
        Model(
            "talker",
            "",
            "",
            folder=tmp_path / "talker",
            method="eagle",
            draft="talker-eagle",
            others=(("medusa", "talker-medusa"),),
        ),
        Model("talker-eagle", "", "", folder=stored / "eagle3"),
        Model("talker-medusa", "", "", folder=stored / "medusa"),
    ]
    table = catalogue.CATALOGUE | {m.name: m for m in models}
    for module in ("names", "drafters"):
        monkeypatch.setattr(f"treespec_jax.checkpoints.{module}.CATALOGUE", table)


@pytest.mark.parametrize(
    ("given", "method", "model"),
    [
        ({}, "eagle", "talker-eagle"),
        ({"method": "eagle"}, "eagle", "talker-eagle"),
        ({"method": "medusa"}, "medusa", "talker-medusa"),
        ({"model": "talker-medusa"}, "medusa", "talker-medusa"),
        ({"method": "auto"}, "auto", None),
        ({"method": "none"}, "none", None),
    ],
)
def test_drafters_of_the_catalogue(given, method, model, catalogued):
    chosen = drafters.choose("talker", SpeculativeConfig(**given))
    assert (chosen.method, chosen.model) == (method, model)
    built = settings.build({"target": "talker", "speculative": given})
    assert built.speculative == chosen
    if model:
        assert built.needs_drafter
        about = drafters.describe_draft(describe("talker"), chosen)
        assert (about.method, about.name, about.known) == (method, model, True)


def test_flags_name_a_drafter(catalogued, stored):
    chosen = {"target": "talker", "speculative.model": str(stored / "medusa_own")}
    assert settings.build(overrides=chosen).speculative.method == "medusa"
    chosen["speculative.method"] = "eagle"
    with pytest.raises(UserError, match="is a drafter of method 'medusa', not 'eagle'"):
        settings.build(overrides=chosen)


def test_each_method_of_a_comparison_has_its_drafter(catalogued, stored):
    built = settings.build({"target": "talker"})
    chosen = {
        method: built.with_tree("chain:2", method=method).speculative.model
        for method in ("eagle", "medusa", "draft_model", "recycle")
    }
    assert chosen == {
        "eagle": "talker-eagle",
        "medusa": "talker-medusa",
        "draft_model": None,
        "recycle": None,
    }
    named = {"target": "talker", "speculative": {"model": str(stored / "medusa_own")}}
    named["benchmark"] = {
        "methods": ("medusa", "eagle", "recycle"),
        "shapes": ("chain:2",),
    }
    possible, skipped = benchmark_job.combinations(settings.build(named))
    assert [made.method for made in possible] == ["none", "medusa", "recycle"]
    assert "is a drafter of method 'medusa', not 'eagle'" in skipped[0]["reason"]


def test_weights_are_loaded_once_for_each_method(catalogued):
    built = settings.build({"target": "talker", "dtype": "float32"})
    pair = loading.load_pair(built)
    first = pair.draft(built.with_tree("chain:2", method="eagle"))
    assert first is pair.draft(built.with_tree("chain:3", method="eagle"))
    assert (first.method, first.known) == ("eagle", True)
    assert pair.draft(built.with_tree("chain:2", method="medusa")).method == "medusa"
    assert pair.draft(built.with_tree("chain:2", method="recycle")) is None
    assert pair.draft(built.with_tree("none")) is None
