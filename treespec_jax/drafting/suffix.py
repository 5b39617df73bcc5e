"""The longest earlier match of the text's end drafts, whatever its length.

Suffix decoding (Oliaro et al., 2411.04975; SAM decoding, Hu et al., 2411.10666) over a
request's own text: the longer the match, the surer its continuation, and the deeper the
tree follows it. See `ngram` for how matches become a tree.
"""

from __future__ import annotations

import dataclasses

from treespec_jax.checks import check_int
from treespec_jax.drafting.ngram import Matching
from treespec_jax.drafting.sources import SourceDrafter


@dataclasses.dataclass(frozen=True)
class SuffixOptions:
    """Settings of method "suffix".

    Attributes:
      longest: tokens of a match that are told apart; longer ones count as so long.
      history: H, tokens of other requests that are searched too; 0 for none.
    """

    longest: int = 32
    history: int = 0

    def __post_init__(self):
        check_int("longest", self.longest, 1)
        check_int("history", self.history, 0)


class Suffix(SourceDrafter):
    """The method "suffix"; see `protocol.Drafter`."""

    Options = SuffixOptions

    @classmethod
    def make(cls, model, tau, options: SuffixOptions):
        return cls((Matching("suffix", options.longest, options.history),))
