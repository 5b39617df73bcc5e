"""Whether a drafter reads its target's rows as it was trained to.

Published files do not always say which layers a drafter reads, and one that reads
others drafts worse; nothing but its speed tells. On text of the target's own, its first
guesses must beat the best guess that looks at nothing, and what they would be if it
read its neighbours' rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax import distributed
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, HeadConfig
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer

# By how much another wiring must be right more often to be the one that was meant: some
# three standard deviations of a difference over 250 rows.
_MARGIN = 0.08


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often a guess is the target's likeliest token.

    Attributes:
      drafter: the share of rows where the drafter's likeliest token is.
      commonest: the same of the one token that is likeliest most often.
      rows: that were compared.
      others: the same as `drafter` under other options, by their text.
    """

    drafter: float
    commonest: float
    rows: int
    others: Mapping[str, float]


def agreement(
    target: Transformer, drafter: nnx.Module, tokens_BT: np.ndarray
) -> Agreement:
    """Compares likeliest tokens, given the true text before them, in one program.

    Args:
      target: with weights.
      drafter: `EagleModel` or `MedusaHeads`.
      tokens_BT: texts that the target wrote, of three tokens at least.
    """
    flats = FlatModule(target), FlatModule(drafter)
    others = _variants(drafter.config, target.config.num_layers)

    @jax.jit
    def compared(leaves, tokens_BT):
        target, drafter = (
            flat.bind(part) for flat, part in zip(flats, leaves, strict=True)
        )
        configs = drafter.config, *others.values()
        return _guesses(target, drafter, configs, tokens_BT)

    leaves = flats[0].leaves, flats[1].leaves
    said_BS, *guesses = distributed.to_host(compared(leaves, np.asarray(tokens_BT)))
    _, counts = np.unique(said_BS, return_counts=True)
    right = [float(np.mean(said_BS == guess_BS)) for guess_BS in guesses]
    return Agreement(
        right[0],
        float(counts.max() / said_BS.size),
        said_BS.size,
        dict(zip(others, right[1:], strict=True)),
    )


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
      UserError: another option makes the drafter clearly better, or it does no better
        than one token for everything would.
    """
    found = agreement(target, drafter, tokens_BT)
    says = f"{name} guesses {found.drafter:.0%} of {found.rows} tokens of the target's"
    anyway = "or check_drafter=False to take it as it is"
    best = max(found.others, key=found.others.get, default=None)
    if best is not None and found.others[best] > found.drafter + _MARGIN:
        raise UserError(
            f"{says} own text, and {found.others[best]:.0%} with {best}: it was "
            f"trained to read other rows; take the option {best}, {anyway}"
        )
    if found.drafter <= found.commonest:
        raise UserError(
            f"{says} own text, of which {found.commonest:.0%} are one and the same "
            f"token: it is another target's, or reads other rows; name them with the "
            f"option feature_layers, take another drafter, {anyway}"
        )
    return found


def _variants(config: HeadConfig, count: int) -> dict[str, HeadConfig]:
    """What else a published file may mean, by the text of the option that says so."""
    if not isinstance(config, EagleConfig) or config.generation != 3:
        return {}
    flipped = not config.norm_before_residual
    made = {
        f"norm_before_residual={str(flipped).lower()}": dataclasses.replace(
            config, norm_before_residual=flipped
        )
    }
    for by in (-1, 1):
        layers = [layer + by for layer in config.feature_layers]
        if layers[0] >= 0 and layers[-1] <= count:
            text = ",".join(map(str, layers))
            made[f"feature_layers=[{text}]"] = dataclasses.replace(
                config, feature_layers=tuple(layers)
            )
    return made


def _guesses(target: Transformer, drafter: nnx.Module, configs, tokens_BT: jax.Array):
    """What follows rows 1, 2, … says the target, and says the drafter a row before.

    Args:
      target: bound.
      drafter: bound; its configuration is replaced.
      configs: what it may be.
      tokens_BT: int32.

    Returns:
      int32 [B, T - 1], the target's; and the same of the drafter for each of `configs`.
    """
    B, T = tokens_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    causal_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    last = target.config.num_layers
    layers = {layer for config in configs for layer in config.feature_layers}
    wanted = tuple(sorted({*layers, last}))
    forward = target(tokens_BT, position_BT, causal_BTT, feature_layers=wanted)
    rows = dict(zip(wanted, forward.features, strict=True))
    said_BT = jnp.argmax(target.unembed(rows[last]), axis=0).reshape(B, T)
    ids = None if drafter.token_ids is None else drafter.token_ids[...]
    guesses = []
    for config in configs:
        drafter.config = config
        features = tuple(
            rows[layer].reshape(-1, B, T)[:, :, :-1].reshape(-1, B * (T - 1))
            for layer in config.feature_layers
        )
        if isinstance(config, EagleConfig):
            made = drafter(
                tokens_BT[:, 1:],
                drafter.fuse(features),
                position_BT[:, :-1],
                causal_BTT[:, :-1, :-1],
            )
            logits_VR = drafter.logit_columns(made.hidden)
        else:
            following_R = tokens_BT[:, 1:].reshape(-1)
            logits_VR = drafter.logit_columns(features[0], following_R)[0]
        guess_R = jnp.argmax(logits_VR, axis=0)
        guess_R = guess_R if ids is None else ids[guess_R]
        guesses.append(guess_R.reshape(B, T - 1))
    return said_BT[:, 1:], *guesses
