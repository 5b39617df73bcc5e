"""The text so far drafts: what followed earlier matches of its last tokens.

Prompt lookup (Saxena 2023; also `prompt_lookup_num_tokens` of transformers) as a tree:
all matches of the last n <= `longest` tokens are followed, in the request's prompt and
output and in what other requests wrote, and their continuations are merged in a trie
(REST, He et al. 2311.08252). A child is worth its share of the matches, the longer ones
weighing more, times how often matches of that length came true lately.
"""

from __future__ import annotations

import dataclasses

import jax

from treespec_jax.checks import check_int
from treespec_jax.drafting import matches as matching
from treespec_jax.drafting.matches import Matches
from treespec_jax.drafting.protocol import Committed, Needs, Sizes
from treespec_jax.drafting.rates import Rates
from treespec_jax.drafting.sources import Nodes, Outlook, SourceDrafter

# Earlier matches that are followed.
MATCHES = 16


@dataclasses.dataclass(frozen=True)
class NgramOptions:
    """Settings of method "ngram".

    Attributes:
      longest: n, tokens of a match at most.
      history: H, tokens of other requests that are searched too; 0 for none.
    """

    longest: int = 3
    history: int = 4096

    def __post_init__(self):
        check_int("longest", self.longest, 1)
        check_int("history", self.history, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatchingState:
    """What was found in the texts, and what it is worth.

    Attributes:
      found: matches of each slot's root, for the tree of this step.
      rates: of matches by length.
    """

    found: Matches
    rates: Rates


class Matching:
    """See `sources.Source`; the trie of the matches of each slot's last tokens.

    Args:
      name: for statistics.
      longest: n, tokens of a match at most.
      history: H, see `NgramOptions`.
    """

    needs = Needs(history=True)

    def __init__(self, name: str, longest: int, history: int):
        self.name = name
        self.longest = longest
        self.history = history

    def init(self, sizes: Sizes) -> MatchingState:
        matching.check_search(self.longest, self.history, sizes.max_len)
        return MatchingState(Matches.none(sizes, MATCHES), matching.start_rates())

    def ingest(self, state: MatchingState, committed: Committed) -> MatchingState:
        if committed.slot is not None:
            return state
        rates = matching.observe(state.rates, state.found, committed)
        # A step that grows no tree finds nothing anew.
        return MatchingState(state.found.forgotten(), rates)

    def copy_slot(self, state: MatchingState, source, destination) -> MatchingState:
        return MatchingState(state.found.copy_slot(source, destination), state.rates)

    def copy_pages(self, state: MatchingState, copies) -> MatchingState:
        return state

    def resume(self, state: MatchingState, committed: Committed) -> MatchingState:
        return state

    def look(self, state: MatchingState, outlook: Outlook) -> MatchingState:
        if outlook.depth == 0:
            return state
        texts, lengths_B = outlook.texts, outlook.context.lengths
        tail_B1n = matching.tail(texts, lengths_B, self.longest)[:, None]
        width = state.found.following.shape[2]
        found = matching.find(texts, tail_B1n, width, MATCHES, self.history)
        return MatchingState(found, state.rates)

    def guess(self, state: MatchingState, nodes: Nodes, scratch):
        return matching.guess(state.found, state.rates, nodes, scratch)


class Ngram(SourceDrafter):
    """The method "ngram"; see `protocol.Drafter`."""

    Options = NgramOptions

    @classmethod
    def make(cls, model, tau, options: NgramOptions):
        return cls((Matching("ngram", options.longest, options.history),))
