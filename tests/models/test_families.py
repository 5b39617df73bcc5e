"""Every feature of a configuration against a decoder in float64 numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import decoder
from tests.models.decoder import FAMILIES, PLAIN, random_model
from treespec_jax.cache import pages as paging
from treespec_jax.config import RotaryConfig
from treespec_jax.models import rotary
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer, parameter_count
from treespec_jax.models.views import CacheView

pytestmark = pytest.mark.slow

PAGE, PREFIX = 8, 13
TEXT = np.random.default_rng(0).integers(3, PLAIN.vocab_size, 24).tolist()
CAUSAL = np.tril(np.ones((24, 24), bool))
#  0 ─┬─ 1 ─┬─ 3 ─── 6
#     │     └─ 4
#     └─ 2 ─── 5 ─── 7
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 5]
TOKENS = [11, 40, 7, 7, 60, 23, 5, 51]
TREE = np.eye(8, dtype=bool)
for _node, _parent in enumerate(PARENTS[1:], 1):
    TREE[_node] |= TREE[_parent]
DEPTH = TREE.sum(axis=1) - 1


class Run:
    """A random model of one family and its compiled forward pass."""

    def __init__(self, name: str):
        self.model = random_model(FAMILIES[name])
        flat = FlatModule(self.model)

        @jax.jit
        def run(leaves, tokens, positions, mask, view, scratch):
            bound = flat.bind(leaves)
            done = bound(tokens, positions, mask, view, scratch)
            return bound.logits(done.hidden), done.kv

        self._run = functools.partial(run, flat.leaves)

    def __call__(self, tokens, positions, mask, view=None, scratch=None):
        rows = [jnp.asarray(x, jnp.int32)[None] for x in (tokens, positions)]
        logits, kv = self._run(*rows, jnp.asarray(mask)[None], view, scratch)
        return np.asarray(logits), kv

    @functools.cached_property
    def whole(self):
        """Logits and rows of the whole text in one pass."""
        return self(TEXT, np.arange(24), CAUSAL)

    @functools.cached_property
    def prefix(self) -> CacheView:
        """A cache of the text's first tokens, on pages out of order."""
        table, zero = jnp.array([[3, 1, 2]], jnp.int32), jnp.zeros(1, jnp.int32)
        layout = paging.CacheLayout(4, PAGE)
        pages = paging.empty_pages(self.model.config, layout)
        order, count = jnp.arange(PREFIX)[None], jnp.full(1, PREFIX, jnp.int32)
        kv, done = self.whole[1], jnp.bool_(True)
        destination = paging.Destination(table, zero, count)
        pages = paging.commit(pages, destination, kv, order, done)
        return CacheView(pages, table, count)

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """By the oracle: logits after every node's own path."""
        return np.stack(
            [
                decoder.logits(
                    self.model,
                    TEXT[:PREFIX] + [TOKENS[n] for n in np.flatnonzero(TREE[node])],
                )[-1]
                for node in range(8)
            ]
        )


@pytest.fixture(scope="module")
def family():
    return functools.cache(Run)


def close(found, wanted):
    assert np.std(wanted) > 0.3
    np.testing.assert_allclose(found, wanted, atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_in_one_pass(name, family):
    """Longer than the window and than the length before stretching."""
    run = family(name)
    close(run.whole[0], decoder.logits(run.model, TEXT))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_path_of_a_tree_behind_a_cache(name, family):
    """Each node's logits are those of its own path as a text; I1 to I3."""
    run = family(name)
    close(run(TOKENS, PREFIX + DEPTH, TREE, run.prefix)[0], run.paths)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_goes_by_the_depth_of_scratch_rows(name, family):
    """A tree in two passes: the second sees the first's rows by their positions."""
    run = family(name)
    at = PREFIX + DEPTH
    top, scratch = run(TOKENS[:3], at[:3], TREE[:3, :3], run.prefix)
    rest, _ = run(TOKENS[3:], at, TREE[3:], run.prefix, scratch)
    close(np.concatenate([top, rest]), run.paths)
    # Were depths those of the new rows alone, a window would miss rows or add some.
    wrong, _ = run(TOKENS[3:], np.r_[at[:3] - 5, at[3:]], TREE[3:], run.prefix, scratch)
    assert np.abs(wrong - rest).max() > 1e-2


FEATURES = {
    "linear": "rotary",
    "llama3": "rotary",
    "yarn": "rotary",
    "mistral": "window local_layers",
    "gemma": "unit_offset_norms scaled_embeddings activation",
    "gemma2": "window,local_layers attention_scale attention_soft_cap logit_soft_cap",
    "gemma3": "window,local_layers,local_rotary local_rotary rotary",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_feature_matters_to_the_oracle(name):
    """Without any one of them the answer is another: no feature is tested in vain."""
    model = random_model(FAMILIES[name])
    want = decoder.logits(model, TEXT)
    defaults = {f.name: f.default for f in dataclasses.fields(PLAIN)}
    if name == "mistral":
        groups = [("window", "local_layers")]
    else:
        groups = [tuple(g.split(",")) for g in FEATURES.get(name, "").split()]
    for fields in groups:
        off = {field: defaults[field] for field in fields}
        model.config = dataclasses.replace(FAMILIES[name], **off)
        assert np.abs(decoder.logits(model, TEXT) - want).max() > 1e-2, fields


STRETCHED = [
    RotaryConfig(),
    RotaryConfig(theta=500.0, scaling="linear", factor=2.5),
    # Llama 3.1 and 3.2.
    RotaryConfig(5e5, "llama3", 8.0, 8192),
    RotaryConfig(5e5, "llama3", 32.0, 8192),
    RotaryConfig(1e6, "yarn", 4.0, 32768),
    RotaryConfig(1e6, "yarn", 4.0, 32768, truncate=False),
    RotaryConfig(1e4, "yarn", 40.0, 4096, beta_fast=16.0, beta_slow=2.0),
]


@pytest.mark.parametrize("config", STRETCHED, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_follow_the_papers(config, head_dim):
    found = rotary.frequencies(config, head_dim)
    np.testing.assert_allclose(found, decoder.speeds(config, head_dim), rtol=1e-12)
    plain = config.theta ** -(np.arange(head_dim // 2) * 2 / head_dim)
    if config.scaling in ("llama3", "yarn"):
        # The fastest pair keeps its speed, the slowest is divided, none is outside.
        np.testing.assert_allclose(
            found[[0, -1]] / plain[[0, -1]], [1, 1 / config.factor]
        )
        assert (np.diff(found / plain) <= 1e-12).all()


def test_the_temperature_of_yarn():
    """By hand: the paper's 0.1 ln 4 + 1; a given one; DeepSeek's two."""
    yarn = RotaryConfig(1e6, "yarn", 4.0, 32768)
    assert rotary.attention_factor(yarn) == pytest.approx(1.1386294361)
    given = dataclasses.replace(yarn, attention_factor=0.8)
    assert rotary.attention_factor(given) == 0.8
    both = dataclasses.replace(yarn, factor=40.0, mscale=1.0, mscale_all_dim=0.707)
    assert rotary.attention_factor(both) == pytest.approx(1.3688879 / 1.2608038)
    one = dataclasses.replace(yarn, factor=40.0, mscale=0.707)
    assert rotary.attention_factor(one) == pytest.approx(1.3688879)
    assert rotary.attention_factor(RotaryConfig(scaling="linear", factor=4.0)) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_bfloat16(name):
    """No feature turns the residual stream, or what the cache keeps, into float32."""

    def run():
        model = Transformer(FAMILIES[name], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        rows = jnp.ones((1, 3), jnp.int32)
        done = model(rows, rows, jnp.ones((1, 3, 3), bool))
        return done.hidden, done.kv, model.logits(done.hidden)

    hidden, kv, logits = jax.eval_shape(run)
    assert {x.dtype for x in (hidden, *kv)} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


def test_parameters_of_features_are_counted():
    """By hand, on top of the plain decoder."""
    plain, D, H, L = parameter_count(PLAIN), 24, 8, 2
    for changes, more in [
        ({"qkv_bias": True}, L * (4 + 2 + 2) * H),
        ({"qk_norm": True}, L * 2 * H),
        ({"post_norms": True}, L * 2 * D),
        ({"unit_offset_norms": True, "scaled_embeddings": True}, 0),
    ]:
        assert parameter_count(dataclasses.replace(PLAIN, **changes)) == plain + more


def test_every_parameter_names_its_axes():
    """One logical axis per dimension, whatever the features."""
    for config in FAMILIES.values():
        model = nnx.eval_shape(lambda c=config: Transformer(c, rngs=nnx.Rngs(0)))
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            axes = leaf.get_metadata("logical_axes")
            assert len(axes) == len(leaf.shape), path


def test_abstract_models_are_those_of_random_ones():
    """Without a random number, hence at once."""
    for config in FAMILIES.values():
        abstract = Transformer(config, dtype=jnp.bfloat16, rngs=None)
        traced = nnx.eval_shape(
            lambda c=config: Transformer(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
        graphs, states = zip(*map(nnx.split, (abstract, traced)), strict=True)
        assert graphs[0] == graphs[1]
        assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])


def test_fresh_norms_change_nothing():
    """A new 1 + w norm starts at w = 0, a new bias at 0."""
    model = Transformer(FAMILIES["gemma3"], rngs=nnx.Rngs(0))
    assert not model.layers[0].mlp_post_norm.scale[...].any()
    assert not model.layers[0].attention.q_norm.scale[...].any()
    model = Transformer(FAMILIES["qwen2"], rngs=nnx.Rngs(0))
    assert not model.layers[0].attention.qkv_bias[...].any()
    assert (model.norm.scale[...] == 1).all()
