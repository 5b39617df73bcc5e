"""Temperatures that follow the structure of a tree (`treespec_jax.adaptive`).

Logits are divided by the factor of their node before temperature and truncation, so
that nobody who reads them has to know.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from treespec_jax.adaptive import FORMS, AdaptiveTemperature

# Base of the form "entropy".
BASE = 0.8
# What a factor is kept within: a cold distribution is a point long before.
LEAST, MOST = 0.05, 20.0
# Numbers of the forms.
NUMBERS = {form: number for number, form in enumerate(FORMS)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("form", "strength"),
    meta_fields=("forms",),
)
@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Forms of several slots, which may differ.

    Attributes:
      form: int32 [B], of NUMBERS; -1: the temperature stays as it is.
      strength: float32 [B].
      forms: static, those that some slot may have; each is worked out for all.
    """

    form: jax.Array
    strength: jax.Array
    forms: tuple[str, ...]

    @classmethod
    def of_all(cls, given: AdaptiveTemperature, where_B: jax.Array) -> Adaptive:
        """One form for the slots marked in bool [B]."""
        number = jnp.where(where_B, NUMBERS[given.form], -1)
        strength = jnp.full(where_B.shape, given.strength, jnp.float32)
        return cls(number, strength, (given.form,))

    def temper(
        self, logits_VR: jax.Array, depth_BT: jax.Array, children_BT: jax.Array
    ) -> jax.Array:
        """Logits [V, R] over the factor of each node; columns of other slots stay.

        Args:
          logits_VR: float32, R = B·T columns, B major.
          depth_BT: int32, of the nodes.
          children_BT: int32, how many they have.
        """
        with jax.named_scope("temper"):
            return logits_VR * (1.0 / self._factors(logits_VR, depth_BT, children_BT))

    def _factors(self, logits_VR, depth_BT, children_BT):
        """[R], 1 for slots without a form."""
        repeats = logits_VR.shape[1] // self.form.shape[0]
        form_R, strength_R = (
            jnp.repeat(x, repeats) for x in (self.form, self.strength)
        )
        found_R = jnp.ones(form_R.shape, logits_VR.dtype)
        for form in self.forms:
            if form == "depth":
                factor_R = strength_R ** depth_BT.reshape(-1)
            elif form == "siblings":
                factor_R = jnp.maximum(children_BT.reshape(-1), 1) ** strength_R
            else:
                factor_R = BASE ** (strength_R / jnp.maximum(entropy(logits_VR), 1e-6))
            factor_R = jnp.clip(factor_R, LEAST, MOST).astype(found_R.dtype)
            found_R = jnp.where(form_R == NUMBERS[form], factor_R, found_R)
        return found_R


def entropy(logits_VR: jax.Array) -> jax.Array:
    """[R], in nats, of the softmax of every column; -inf entries count for nothing."""
    gap_VR = logits_VR - jnp.max(logits_VR, axis=0)
    weight_VR = jnp.exp(gap_VR)
    total_R = jnp.sum(weight_VR, axis=0)
    energy_VR = jnp.where(weight_VR > 0, weight_VR * gap_VR, 0.0)
    return jnp.log(total_R) - jnp.sum(energy_VR, axis=0) / total_R
