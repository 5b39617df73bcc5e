"""Published layouts of EAGLE and Medusa load, and compute what they are said to."""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints import published
from tests.checkpoints.published import IDS, VD, WIDE, D, Eagle, V, settings, write
from treespec_jax.checkpoints import describe, drafters
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.checkpoints.torch_file import TorchFile
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer

LAYERS = 8


def make_target(width=WIDE) -> LoadedModel:
    config = ModelConfig(
        vocab_size=V,
        embed_dim=width,
        mlp_dim=8,
        num_layers=LAYERS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=64,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    return LoadedModel(config, model, None, "target", np.dtype("float32"))


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def narrow():
    """As wide as the layer: EAGLE-1 goes on from its rows."""
    return make_target(D)


def nested(**changes):
    """The settings of a layer as speculators writes them."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": settings(),
        "draft_vocab_size": VD,
        "target_hidden_size": WIDE,
        "norm_before_residual": False,
    } | changes


THIRD = dict(
    architectures=["LlamaForCausalLMEagle3"],
    draft_vocab_size=VD,
    target_hidden_size=WIDE,
)
# Files, and the layers that they read.
CASES = {
    "eagle3": (Eagle(), settings(**THIRD), (1, 3, 4)),
    "eagle3_layers": (
        Eagle(prefix="layers.0"),
        settings(**THIRD, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}),
        (1, 4, 6),
    ),
    "eagle3_full": (
        Eagle(reduced=False),
        settings(target_hidden_size=WIDE, eagle_aux_hidden_state_layer_ids=[2, 5, 7]),
        (1, 4, 6),
    ),
    "speculators": (Eagle(prefix="layers.0"), nested(), (1, 3, 4)),
    "speculators_normed": (
        Eagle(prefix="layers.0", norm="all", before=True),
        nested(
            norm_before_residual=True,
            norm_before_fc=True,
            eagle_aux_hidden_state_layer_ids=[1, 3, 5],
        ),
        (0, 2, 4),
    ),
    "speculators_qwen3": (
        Eagle(prefix="layers.0", norm="each", qk_norm=True),
        nested(transformer_layer_config=settings(model_type="qwen3")),
        (1, 3, 4),
    ),
    "eagle1": (Eagle(third=False, prefix="layers.0"), settings(), (LAYERS,)),
    "eagle1_bias": (
        Eagle(third=False, prefix="layers.0", bias=True, input_norm=True, embeds=False),
        settings(),
        (LAYERS,),
    ),
}


def both_passes(model, tokens, features, last):
    """Our logits [T, Vd] and outputs of a chain, and those of a node below its end."""
    T = len(tokens)
    columns = tuple(jnp.asarray(f.T, jnp.float32) for f in features)
    position_1T = jnp.arange(T, dtype=jnp.int32)[None]
    first = model(
        jnp.asarray(tokens, jnp.int32)[None],
        model.fuse(columns),
        position_1T,
        jnp.tril(jnp.ones((1, T, T), bool)),
    )
    below = model(
        jnp.full((1, 1), last, jnp.int32),
        first.hidden[:, -1:],
        jnp.arange(T + 1, dtype=jnp.int32)[None],
        jnp.ones((1, 1, T + 1), bool),
        scratch=first.kv,
    )
    logits = [model.logit_columns(x.hidden).T for x in (first, below)]
    return np.concatenate(logits), np.asarray(first.hidden.T)


@pytest.mark.parametrize("name", CASES)
def test_what_a_layer_computes(name, target, narrow, tmp_path):
    kind, config, layers = CASES[name]
    target = target if kind.third else narrow
    weights = kind.tensors()
    folder = write(tmp_path / name, weights, config)
    about = drafters.describe_drafter(folder, target)
    assert (about.method, about.config.feature_layers) == ("eagle", layers)
    model = drafters.load_drafter(about, target).model

    rng, T = np.random.default_rng(3), 6
    tokens, last = rng.integers(0, V, T), 17
    width, count = (WIDE, 3) if kind.third else (D, 1)
    features = [rng.normal(size=(T, width)) for _ in range(count)]
    embedding = weights.get("embed_tokens.weight", target.model.embedding[...])
    head = weights.get("lm_head.weight", target.model.head[...])
    parts = kind, weights, np.asarray(embedding), np.asarray(head)
    hidden = published.fused(kind, weights, features)
    causal = np.tril(np.ones((T + 1, T + 1), bool))
    _, outputs = published.eagle_pass(*parts, tokens, hidden, causal[:T, :T])
    wanted, _ = published.eagle_pass(
        *parts, [*tokens, last], np.concatenate([hidden, outputs[-1:]]), causal
    )
    found, ours = both_passes(model, tokens, features, last)
    np.testing.assert_allclose(ours, outputs, atol=1e-4)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    if kind.third and kind.reduced:
        assert model.token_ids[...].tolist() == IDS.tolist()
    else:
        assert model.token_ids is None


@pytest.mark.parametrize("form", ["pt", "safetensors", "file"])
def test_what_heads_compute(form, target, tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    heads, blocks = 3, 2
    weights = published.medusa_tensors(heads, blocks, dtype="bfloat16")
    path = tmp_path
    if form == "safetensors":
        save_file(weights, tmp_path / "medusa_lm_head.safetensors")
        # The target's own may lie beside it.
        save_file({"x": np.zeros(3)}, tmp_path / "model.safetensors")
    else:
        file = tmp_path / "medusa_lm_head.pt"
        published.write_torch(file, weights, monkeypatch=monkeypatch)
        path = file if form == "file" else path
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2}')
    about = drafters.describe_drafter(path, target)
    assert about.notes == (
        f"{tmp_path}/config.json says medusa_num_heads=2; the weights have 3 heads, "
        "which are used",
    )
    assert about.dtype == "bfloat16"
    model = drafters.load_drafter(about, target).model
    rows = np.random.default_rng(2).normal(size=(5, WIDE)).astype(np.float32)
    wanted = published.medusa_logits(weights, heads, blocks, rows)
    found = model.logit_columns(jnp.asarray(rows.T), jnp.zeros(5, jnp.int32))
    np.testing.assert_allclose(found.transpose(0, 2, 1), wanted, atol=1e-4)


def test_layer_in_a_torch_file(narrow, tmp_path, monkeypatch):
    """EAGLE-1 in pytorch_model.bin is known by its tensors alone."""
    kind, config, _ = CASES["eagle1"]
    weights = kind.tensors()
    folder = write(tmp_path / "a", weights, config)
    (folder / "model.safetensors").unlink()
    published.write_torch(
        folder / "pytorch_model.bin", weights, monkeypatch=monkeypatch
    )
    about = drafters.describe_drafter(folder, narrow)
    found = drafters.load_drafter(about, narrow).model
    np.testing.assert_array_equal(found.fc[...], weights["fc.weight"])
    with pytest.raises(UserError, match="a drafter of method 'eagle', which cannot"):
        describe(folder)


@pytest.mark.parametrize("missing", ["midlayer.hidden_norm.weight", "norm.weight"])
def test_missing_tensor(missing, target, tmp_path):
    kind, config, _ = CASES["eagle3"]
    weights = kind.tensors()
    del weights[missing]
    folder = write(tmp_path / "a", weights, config)
    with pytest.raises(UserError):
        drafters.load_drafter(drafters.describe_drafter(folder, target), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"midlayer.extra": np.zeros(2, np.float32)}, "midlayer.extra would stay"),
        ({"d2t": np.arange(VD)}, "d2t and t2d name different tokens"),
        ({"d2t": np.zeros(3, np.int64)}, r"tensor d2t \[23\] is missing"),
        ({"fc.weight": np.zeros((D, 2 * WIDE), np.float32)}, "fc.weight has shape"),
        ({"norm.weight": np.full(D, np.nan, np.float32)}, "holds NaN"),
    ],
)
def test_wrong_tensors(change, message, target, tmp_path):
    kind, config, _ = CASES["eagle3"]
    folder = write(tmp_path / "a", kind.tensors() | change, config)
    with pytest.raises(UserError, match=message):
        drafters.load_drafter(drafters.describe_drafter(folder, target), target)


def test_d2t_of_absolute_numbers_is_told(target, tmp_path):
    """Some conversions store the numbers themselves."""
    kind, config, _ = CASES["eagle3"]
    weights = kind.tensors() | {"d2t": IDS.astype(np.int64)}
    folder = write(tmp_path / "a", weights, config)
    about = drafters.describe_drafter(folder, target)
    with pytest.raises(UserError, match="or d2t holds no offsets"):
        drafters.load_drafter(about, target)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eagle3", {"num_hidden_layers": 2}, "num_hidden_layers=2 is not supported"),
        ("eagle3", {"vocab_size": 61}, "for a target of tokens 61, this one has 60"),
        ("eagle3", {"target_hidden_size": 8}, "features of width 8, this one has 24"),
        ("eagle3", {"model_type": "mamba"}, 'model_type="mamba" is not supported'),
        ("eagle3", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling="),
        ("eagle3", {"norm_output": True}, "norm_output=True is not supported"),
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": [0, 3, 4]},
            r"reads the outputs of layers \[-1, 2, 3\]",
        ),
        (
            "eagle3",
            {"eagle_aux_hidden_state_layer_ids": [2, 4, 11]},
            r"feature_layers=\[1, 3, 10\] is past the target's 8 layers",
        ),
        (
            "speculators",
            {"speculators_model_type": "dflash"},
            "speculators_model_type='dflash' is not supported, only eagle3",
        ),
        ("speculators", {"transformer_layer_config": 3}, "must hold the layer's"),
    ],
)
def test_settings_that_are_not_read(name, changes, message, target, tmp_path):
    kind, config, _ = CASES[name]
    folder = write(tmp_path / "a", kind.tensors(), config | changes)
    with pytest.raises(UserError, match=message):
        drafters.describe_drafter(folder, target)


def test_options_say_what_the_file_does_not(target, tmp_path):
    kind, config, _ = CASES["speculators"]
    del (config := dict(config))["norm_before_residual"]
    folder = write(tmp_path / "a", kind.tensors(), config)
    about = drafters.describe_drafter(folder, target)
    assert not about.config.norm_before_residual
    assert about.notes == (
        f"{folder}/config.json does not say norm_before_residual; False is assumed",
    )
    said = {"norm_before_residual": True, "feature_layers": [0, 3, 7]}
    about = drafters.describe_drafter(folder, target, said)
    assert about.config.norm_before_residual
    assert about.config.feature_layers == (0, 3, 7)
    assert not about.notes


def test_targets_without_the_usual_layers(tmp_path):
    small = make_target()
    config = dataclasses.replace(small.config, num_layers=4)
    small = dataclasses.replace(small, config=config)
    kind, about, _ = CASES["eagle3"]
    folder = write(tmp_path / "a", kind.tensors(), about)
    with pytest.raises(UserError, match="name others with the option feature_layers"):
        drafters.describe_drafter(folder, small)
    said = {"feature_layers": [0, 1, 3]}
    assert drafters.describe_drafter(folder, small, said).config.feature_layers


# ---- pickles


class Evil:
    """Calls something on loading."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "exit 3"), "posix.system"),
        (Evil(eval, "1 + 1"), "builtins.eval|__builtin__.eval"),
        (Evil(getattr, "a", "b"), "builtins.getattr|__builtin__.getattr"),
    ],
)
def test_pickles_that_would_run_something(evil, name, target, tmp_path, monkeypatch):
    weights = published.medusa_tensors()
    file = tmp_path / "medusa_lm_head.pt"
    published.write_torch(file, weights, {"x": evil}, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match=f"asks for ({name}), which builds no tensor"):
        drafters.describe_drafter(tmp_path, target)


@pytest.mark.parametrize("value", [3, "text", {"a": 1}])
def test_what_is_no_tensor(value, tmp_path, monkeypatch):
    file = tmp_path / "x.pt"
    weights = {"w": np.ones(2, np.float32)}
    published.write_torch(file, weights, {"step": value}, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="'step' is no tensor"):
        TorchFile(file)


def test_damaged_torch_files(tmp_path, monkeypatch):
    file = tmp_path / "x.pt"
    (tmp_path / "old.pt").write_bytes(b"\x80\x02not a zip archive")
    with pytest.raises(UserError, match="no file of torch.save's zip form"):
        TorchFile(tmp_path / "old.pt")
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    published.write_torch(file, weights, strides=(1, 2), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="not stored row by row"):
        TorchFile(file)
    published.write_torch(file, weights, monkeypatch=monkeypatch)
    data = file.read_bytes()
    assert TorchFile(file).read("w", (slice(1, 2), slice(0, 2))).tolist() == [[3, 4]]
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        TorchFile(file)


def test_storages_that_lie(tmp_path, monkeypatch):
    """A tensor may not reach beyond the numbers that the file holds for it."""
    import zipfile

    file = tmp_path / "x.pt"
    weights = {"w": np.ones((4, 4), np.float32)}
    published.write_torch(file, weights, monkeypatch=monkeypatch)
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    held["archive/data/0"] = held["archive/data/0"][:-4]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="tensor w lies outside the numbers"):
        TorchFile(file)
