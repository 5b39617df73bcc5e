"""Everything that drafts without a model, in one tree: the default where there is none.

One node budget for three sources: long matches are copied (suffix), runners-up of the
newest token and recycled successors fill the rest. No source has a share of its own:
each guess is worth what guesses of its kind have come true lately, and the tree takes
the likeliest paths.
"""

from __future__ import annotations

import dataclasses

from treespec_jax.checks import check_int
from treespec_jax.drafting.last_logits import LastLogits
from treespec_jax.drafting.ngram import Matching
from treespec_jax.drafting.recycle import Recycling
from treespec_jax.drafting.sources import SourceDrafter


@dataclasses.dataclass(frozen=True)
class AutoOptions:
    """Settings of method "auto".

    Attributes:
      longest: tokens of a match that are told apart.
      history: H, tokens of other requests that are searched too; 0 for none.
      successors: of each token that are recycled.
      candidates: runners-up of the newest token.
    """

    longest: int = 16
    history: int = 4096
    successors: int = 8
    candidates: int = 6

    def __post_init__(self):
        for name in ("longest", "successors", "candidates"):
            check_int(name, getattr(self, name), 1)
        check_int("history", self.history, 0)


class Auto(SourceDrafter):
    """The method "auto"; see `protocol.Drafter`."""

    Options = AutoOptions

    @classmethod
    def make(cls, model, tau, options: AutoOptions):
        return cls(
            (
                Matching("suffix", options.longest, options.history),
                Recycling(options.successors, "engine"),
                LastLogits(options.candidates),
            )
        )
