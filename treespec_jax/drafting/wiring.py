"""Whether a drafter reads its target's rows as it was trained to.

Published files do not always say which layers a drafter reads. One that reads others
drafts nonsense, and nothing but its speed tells. On text of the target's own, its first
guesses must at least beat the best guess that looks at nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often a guess is the target's likeliest token.

    Attributes:
      drafter: the share of rows where the drafter's likeliest token is.
      commonest: the same of the one token that is likeliest most often.
      rows: that were compared.
    """

    drafter: float
    commonest: float
    rows: int


def agreement(
    target: Transformer, drafter: nnx.Module, tokens_BT: np.ndarray
) -> Agreement:
    """Compares likeliest tokens, given the true text before them, in one pass.

    Args:
      target: with weights.
      drafter: `EagleModel` or `MedusaHeads`.
      tokens_BT: texts that the target wrote, of three tokens at least.
    """
    flats = FlatModule(target), FlatModule(drafter)

    @jax.jit
    def compared(leaves, tokens_BT):
        target, drafter = (
            flat.bind(part) for flat, part in zip(flats, leaves, strict=True)
        )
        return _guesses(target, drafter, tokens_BT)

    leaves = flats[0].leaves, flats[1].leaves
    said_BS, guessed_BS = map(np.asarray, compared(leaves, jnp.asarray(tokens_BT)))
    _, counts = np.unique(said_BS, return_counts=True)
    right = float(np.mean(said_BS == guessed_BS))
    return Agreement(right, counts.max() / said_BS.size, said_BS.size)


def check(
    target: Transformer, drafter: nnx.Module, tokens_BT: np.ndarray, name: str
) -> Agreement:
    """Compares as `agreement` does.

    Args:
      target: with weights.
      drafter: that was loaded for it.
      tokens_BT: texts that the target wrote.
      name: of the drafter.

    Raises:
      UserError: the drafter does no better than one token for everything would.
    """
    found = agreement(target, drafter, tokens_BT)
    if found.drafter > found.commonest:
        return found
    hints, config = [], drafter.config
    if isinstance(config, EagleConfig) and config.generation == 3:
        near = [[layer + by for layer in config.feature_layers] for by in (1, -1)]
        hints = [f"feature_layers={layers}" for layers in near if layers[0] >= 0]
        hints.append(f"norm_before_residual={not config.norm_before_residual}")
    raise UserError(
        f"{name} guesses {found.drafter:.0%} of {found.rows} tokens of the target's "
        f"own text, {found.commonest:.0%} are one and the same token: it is another "
        "target's, or reads other rows; try "
        + ", ".join([f"option {hint}" for hint in hints] + ["another drafter"])
        + ", or check_drafter=False to take it as it is"
    )


def _guesses(target: Transformer, drafter: nnx.Module, tokens_BT: jax.Array):
    """What follows rows 1, 2, … says the target, and says the drafter a row before.

    Returns:
      int32 [B, T - 1] twice.
    """
    B, T = tokens_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    causal_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    layers, last = drafter.config.feature_layers, target.config.num_layers
    wanted = tuple(sorted({*layers, last}))
    forward = target(tokens_BT, position_BT, causal_BTT, feature_layers=wanted)
    rows = dict(zip(wanted, forward.features, strict=True))
    said_BT = jnp.argmax(target.unembed(rows[last]), axis=0).reshape(B, T)

    def without_last(x_DR):
        return x_DR.reshape(-1, B, T)[:, :, :-1].reshape(-1, B * (T - 1))

    features = tuple(without_last(rows[layer]) for layer in layers)
    if isinstance(drafter.config, EagleConfig):
        made = drafter(
            tokens_BT[:, 1:],
            drafter.fuse(features),
            position_BT[:, :-1],
            causal_BTT[:, :-1, :-1],
        )
        logits_VR = drafter.logit_columns(made.hidden)
    else:
        logits_VR = drafter.logit_columns(features[0])[0]
    guess_R = jnp.argmax(logits_VR, axis=0)
    if drafter.token_ids is not None:
        guess_R = drafter.token_ids[...][guess_R]
    return said_BT[:, 1:], guess_R.reshape(B, T - 1)
