"""Finds the factors per channel that a model loses less with in int8."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.checkpoints.int8_scales import LARGEST, STEPS, Int8Scales
from treespec_jax.checkpoints.loading import LoadedModel, check_floats
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.layers import Rows
from treespec_jax.models.linear import linear
from treespec_jax.models.rotary import rotary_angles
from treespec_jax.models.transformer import Transformer

# How much of a channel's largest activation moves into the matrix.
ALPHA = 0.7
_NAMES = ("attention", "mlp", "down")


def largest_activations(
    model: Transformer, windows: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """Largest numbers of every channel that a product reads, over some texts.

    Args:
      model: in floating point.
      windows: int32 [width] each, of one width.

    Returns:
      float32 by name of `Int8Scales`: [layers, D] or [layers, F].
    """
    flat = FlatModule(model)

    @jax.jit
    def one_pass(leaves, tokens_T):
        return _pass(flat.bind(leaves), tokens_T)

    best: dict[str, np.ndarray] = {}
    for window in windows:
        found = jax.device_get(one_pass(flat.leaves, window))
        best = {k: np.maximum(best.get(k, 0), v) for k, v in found.items()}
    return best


def _pass(model: Transformer, tokens_T: jax.Array) -> dict[str, jax.Array]:
    """The same of one text."""
    cfg, width = model.config, len(tokens_T)
    positions_T, mask_1TT = (
        jnp.arange(width),
        jnp.tril(jnp.ones((1, width, width), bool)),
    )
    layers = tuple(range(cfg.num_layers))
    done = model(tokens_T[None], positions_T[None], mask_1TT, feature_layers=layers)
    first_DR = model.embed(tokens_T)
    found: dict[str, list[jax.Array]] = {name: [] for name in _NAMES}
    for number, (layer, x_DR) in enumerate(
        zip(model.layers, (first_DR, *done.features), strict=False)
    ):
        local = number in cfg.local_layers
        rotary = (cfg.local_rotary or cfg.rotary) if local else cfg.rotary
        angles = rotary_angles(rotary, cfg.head_dim, positions_T)
        rows = Rows(angles, mask_1TT, positions_T[None] if local else None)
        normed_DR = layer.attention_norm(x_DR)
        out_DR, _ = layer.attention(normed_DR, rows, None, None, None)
        if layer.post_norms:
            out_DR = layer.attention_post_norm(out_DR)
        between_DR = layer.mlp_norm(x_DR + out_DR)
        gate_FR, up_FR = linear(layer.mlp.gate_up[...], between_DR)
        mlp = layer.mlp
        gated_FR = mlp.arithmetic.activate(mlp.activation, gate_FR)
        hidden_FR = gated_FR * up_FR
        for name, read in zip(_NAMES, (normed_DR, between_DR, hidden_FR), strict=True):
            found[name].append(jnp.max(jnp.abs(read), axis=1))
    return {name: jnp.stack(rows) for name, rows in found.items()}


def find(
    loaded: LoadedModel, windows: Iterable[np.ndarray], alpha: float = ALPHA
) -> Int8Scales:
    """Factors a^alpha / w^(1 - alpha), rounded to steps (2211.10438, eq. 4).

    a is a channel's largest activation, w the largest weight that it is multiplied by.
    Their geometric mean over the channels of a matrix is 1.

    Args:
      loaded: in floating point.
      windows: token ids of texts, int32 [width] each, of one width.
      alpha: in [0, 1].

    Raises:
      UserError: its matrices are in int8 already.
    """
    check_floats(loaded)
    activations = largest_activations(loaded.model, windows)
    weights = {
        "attention": [layer.attention.qkv for layer in loaded.model.layers],
        "mlp": [layer.mlp.gate_up for layer in loaded.model.layers],
        "down": [layer.mlp.down for layer in loaded.model.layers],
    }
    found = {}
    for name in _NAMES:
        columns = np.stack([_largest(matrix[...]) for matrix in weights[name]])
        # A channel that is always zero stays as it is.
        a, w = (np.log2(np.where(x > 0, x, 1.0)) for x in (activations[name], columns))
        logs = alpha * a - (1 - alpha) * w
        logs -= logs.mean(axis=1, keepdims=True)
        steps = np.clip(np.rint(STEPS * logs), -LARGEST, LARGEST)
        found[name] = steps.astype(np.int8)
    return Int8Scales(**found)


def _largest(matrix: jax.Array) -> np.ndarray:
    """Largest weight of every column."""
    top = jnp.max(jnp.abs(matrix), axis=tuple(range(matrix.ndim - 1)))
    return np.asarray(top, np.float32)
