"""Temperatures that follow the structure of a tree, as users write them; free of jax.

A text names a form and a strength s. The temperature after a node is then T times

| text | factor | of the node |
| --- | --- | --- |
| `depth:s` | s^d | its depth d: edges from the root |
| `siblings:s` | n^s | the number n of its children |
| `entropy:s` | 0.8^(s / H) | the entropy H of the distribution after it, in nats |

Decay with depth is the geometric schedule of annealing (Kirkpatrick et al., 1983, whose
time is the depth here). A power of the number of siblings spreads a drafter's proposals
the more, the more of them there are. The last form is EDT's (Zhang et al., 2403.14541),
whose base is 0.8: a sure model gets cold, an unsure one keeps T.
"""

from __future__ import annotations

import dataclasses
import re

from treespec_jax.errors import UserError

# Least and greatest strength of each form; the least one of "depth" and "entropy" is
# refused itself.
FORMS = {"depth": (0.0, 2.0), "siblings": (-2.0, 2.0), "entropy": (0.0, 10.0)}


@dataclasses.dataclass(frozen=True)
class AdaptiveTemperature:
    """A form of FORMS, and its strength."""

    form: str
    strength: float

    @property
    def by_tree(self) -> bool:
        """Whether it depends on the drafted tree, not on the distribution alone."""
        return self.form != "entropy"


def parse(name: str, text: object) -> AdaptiveTemperature | None:
    """Reads a text such as "depth:0.9"; None of an empty one.

    Args:
      name: of the setting, for messages.
      text: what the user gave.

    Raises:
      UserError: an unknown form, or a strength that is no number or out of range.
    """
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text such as 'depth:0.9', got {text!r}")
    if not text:
        return None
    form, _, number = text.partition(":")
    if form not in FORMS or not re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", number):
        raise UserError(
            f"{name} {text!r} is malformed; write "
            f"{', '.join(f'{form}:NUMBER' for form in FORMS)}, such as depth:0.9"
        )
    (low, high), strength = FORMS[form], float(number)
    open_low = low == 0
    if not low <= strength <= high or (open_low and strength == low):
        above = "above" if open_low else "at least"
        raise UserError(
            f"{name} {text!r}: the number must be {above} {low:g} and at most {high:g}"
        )
    return AdaptiveTemperature(form, strength)
