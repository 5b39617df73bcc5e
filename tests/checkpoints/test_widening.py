"""A widened model computes what the small one does."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.support import forward, greedy
from tests.conftest import TINY
from treespec_jax.checkpoints import LoadedModel, load, save
from treespec_jax.checkpoints.widening import widen, widened_config
from treespec_jax.config import RotaryConfig
from treespec_jax.errors import UserError
from treespec_jax.models.rotary import frequencies
from treespec_jax.models.transformer import Transformer, parameter_count

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ROWS, TOKENS = 2, 40
TIED = dataclasses.replace(TINY, tied_embeddings=True)
# Every size of TINY (97, 32, 48, 2, 4, 2, 8), none to a multiple.
ALL = dict(
    vocab_size=130,
    embed_dim=75,
    mlp_dim=101,
    num_layers=5,
    num_heads=9,
    num_kv_heads=3,
    head_dim=14,
)


def loaded(config, dtype=jnp.float32) -> LoadedModel:
    """A model whose norms are random, too."""
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "scale":
            leaf[...] = jnp.asarray(1 + 0.3 * rng.standard_normal(leaf.shape), dtype)
    return LoadedModel(config, model, None, "tiny", np.dtype(dtype))


def largest_difference(small: LoadedModel, sizes) -> tuple[float, float]:
    """Of the logits of random rows; and the highest logit of a new token."""
    large = widen(small, widened_config(small.config, sizes))
    assert sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(large.model))
    ) == parameter_count(large.config)
    V = small.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, V, (ROWS, TOKENS))
    before, _ = forward(small.model, tokens)
    after, _ = forward(large.model, tokens)
    difference = float(np.abs(np.asarray(after[..., :V] - before)).max())
    return difference, float(np.asarray(after[..., V:]).max(initial=-np.inf))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (TIED, dict(embed_dim=33)),
        (TINY, dict(mlp_dim=49)),
        (TINY, dict(num_layers=3)),
        (TINY, dict(head_dim=10)),
        (TINY, dict(num_heads=6)),
        (TINY, dict(num_kv_heads=4)),
        (TINY, dict(num_heads=8, num_kv_heads=8)),
        (TINY, dict(vocab_size=98, embed_dim=34)),
        (TIED, dict(vocab_size=98, embed_dim=34)),
        (TINY, ALL),
        (TIED, ALL),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_logits_stay(config, sizes):
    difference, highest = largest_difference(loaded(config), sizes)
    assert difference < 1e-4
    assert highest < -1000


@pytest.mark.parametrize("name", ["llama3", "llama_yarn", "qwen2_window"])
def test_families(name):
    """Scaled rotary positions, windows and biases; every size grows by a half."""
    small = load(GOLDEN / name, "float32")
    c = small.config
    sizes = dict(
        vocab_size=c.vocab_size + 31,
        embed_dim=c.embed_dim * 3 // 2,
        mlp_dim=c.mlp_dim * 3 // 2,
        num_layers=c.num_layers + 1,
        num_heads=c.num_heads * 2,
        num_kv_heads=c.num_kv_heads * 2,
        head_dim=c.head_dim * 3 // 2 // 2 * 2,
    )
    difference, highest = largest_difference(small, sizes)
    assert difference < 1e-4
    assert highest < -1000


def test_float16():
    """The rounding of the dtype alone; four times the width keeps norms exact."""
    small = loaded(TIED, jnp.float16)
    difference, highest = largest_difference(small, ALL | dict(embed_dim=128))
    assert difference < 0.02
    assert highest < -1000


def test_text_stays(tmp_path):
    """Greedy text, through a file; old layers stand apart from each other."""
    small = loaded(TIED)
    config = widened_config(small.config, ALL)
    save(widen(small, config), tmp_path / "wide")
    large = load(tmp_path / "wide")
    assert large.config == config
    assert greedy(large.model, [5, 6, 7], 20) == greedy(small.model, [5, 6, 7], 20)


def test_seed():
    """Decides the random weights, and nothing else."""
    small, config = loaded(TINY), widened_config(TINY, dict(mlp_dim=64))
    first, again, other = (widen(small, config, seed).model for seed in (0, 0, 1))
    gates = [np.asarray(m.layers[0].mlp.gate_up[...]) for m in (first, again, other)]
    assert np.array_equal(gates[0], gates[1])
    assert not np.array_equal(gates[0], gates[2])
    assert np.array_equal(gates[0][:, :48], gates[2][:, :48])
    assert (gates[0] != 0).all()


def test_frequencies_of_wider_heads():
    """Factors of their own, too: the first pairs of the wide heads turn as before."""
    factored = RotaryConfig(scaling="factors", factors=(1.0, 1.0, 2.0, 8.0))
    config = dataclasses.replace(TINY, rotary=factored)
    wide = widened_config(config, dict(head_dim=14))
    found, wanted = frequencies(wide.rotary, 14), frequencies(factored, 8)
    np.testing.assert_allclose(found[:4], wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (TINY, dict(width=3), "size 'width' is unknown"),
        (TINY, dict(mlp_dim=47), "mlp_dim=47 is below the model's 48"),
        (TINY, dict(mlp_dim="64"), "mlp_dim must be a whole number"),
        (TINY, dict(num_heads=5), "num_heads=5 is not a multiple of num_kv_heads=2"),
        (
            dataclasses.replace(TINY, num_heads=6),
            dict(num_heads=6, num_kv_heads=3),
            "4 key/value heads are needed; raise num_kv_heads or num_heads",
        ),
        (TINY, dict(head_dim=9), "head_dim must be even"),
        (TINY, dict(head_dim=8000), "rotary theta 10000 to that power"),
        (TINY, dict(vocab_size=98), "needs two more channels; raise embed_dim to 34"),
        (
            dataclasses.replace(TINY, norm_eps=0),
            dict(vocab_size=98, embed_dim=64),
            "cannot be reached from a model with norm_eps=0",
        ),
        (
            dataclasses.replace(TINY, qk_norm=True, family="qwen3"),
            dict(mlp_dim=64),
            "a qwen3 model with qk_norm cannot be widened",
        ),
    ],
)
def test_sizes_that_cannot_be_reached(config, sizes, message):
    with pytest.raises(UserError, match=message):
        widened_config(config, sizes)
