"""What the engine asks of a drafter.

A drafter is a small immutable object of pure functions over a state of its own. One
that has no model and repeats the root:

  class Repeat:
      module = None
      needs = Needs()
      sources = ("root",)
      tau = 1.0
      Options = NoOptions

      @classmethod
      def make(cls, model, tau, options): return cls()

      def with_module(self, module): return self
      def init(self, sizes): return ()
      def ingest(self, state, committed): return state
      def copy_slot(self, state, source, destination): return state
      def copy_pages(self, state, copies): return state
      def resume(self, state, committed): return state

      def propose(self, state, shape, context):
          V, B = context.vocab, context.root.shape[0]
          logits_VB = 5.0 * jax.nn.one_hot(context.root, V, axis=0)

          def expand(level, scratch):
              R = level.tokens.size
              return 5.0 * jax.nn.one_hot(level.tokens.reshape(R), V, axis=0), scratch

          return growth.grow(shape, context, logits_VB, expand, self.tau), state

One file and one line of `drafting.METHODS` make it selectable by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
from flax import nnx

from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.cache.pages import CacheLayout, Copies
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling.penalties import Penalties
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.sampling.temperature import Adaptive
from treespec_jax.trees.shapes import TreeShape
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A drafter without settings of its own."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a drafter wants to be given.

    Attributes:
      feature_layers: ascending numbers of the target's layers whose outputs it reads
        (`Committed.features`).
      history: whether it looks at the whole text so far, which a slot's state must
        then be able to hold (`Sizes.max_len`).
      successors: K, best tokens after every row that the target computes
        (`Committed.successors`); 0 for none.
      in_pages: whether it keeps something for every row in the target's pages.
      next_tokens: tokens after a row that this depends on.
      waits: whether tokens can wait for passes of its model: it is a `PatientDrafter`.
    """

    feature_layers: tuple[int, ...] = ()
    history: bool = False
    successors: int = 0
    in_pages: bool = False
    next_tokens: int = 0
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a drafter's state has to hold.

    Attributes:
      batch: B, slots.
      max_len: tokens of a text.
      depth: C, levels of the deepest tree that will be asked for.
      layout: of a cache, whose page table is the target's.
      vocab: V, of the target.
      window: C + 1 at least, tokens that `ingest` takes in at once but for prompts.
      resumes: whether a text may begin with pages that are in the cache already.
      backlog: R, tokens of a text that can wait besides; 0 if none ever do.
    """

    batch: int
    max_len: int
    depth: int
    layout: CacheLayout
    vocab: int
    window: int
    resumes: bool = True
    backlog: int = 0


@dataclasses.dataclass(frozen=True)
class Successors:
    """What the target would say after every row that it has just computed.

    Of a step these are all nodes of the tree, accepted or not; of a chunk of a prompt,
    its tokens.

    Attributes:
      tokens: int32 [n, T], the row's token.
      real: bool [n, T]; the other rows say nothing.
      best: int32 [n, T, K], likeliest tokens after it, best first.
      logits: float32 [n, T, K], the target's for those, before penalties.
      newest: int32 [n], the row whose logits decided `Committed.root`; of a prompt, the
        row before it.
      path: int32 [n, C], the rows of `Committed.tokens`.
    """

    tokens: jax.Array
    real: jax.Array
    best: jax.Array
    logits: jax.Array
    newest: jax.Array
    path: jax.Array


@dataclasses.dataclass(frozen=True)
class Committed:
    """Tokens whose keys and values the target has just put into its cache.

    Of a step, n = B slots in order; of a chunk of a prompt, n = 1.

    Attributes:
      slot: int32 [], whose chunk it is; None for a step.
      tokens: int32 [n, C], at positions from `start`; the first `count` are real.
      following: int32 [n, C], the token after each of them.
      root: int32 [n], the token after the last: the new root, which is in no cache yet.
      start: int32 [n], absolute position of the first.
      count: int32 [n]; 0 for a slot that did nothing.
      features: per layer of `Needs.feature_layers` [n, C, D], the target's rows of
        `tokens`.
      page_table: int32 [n, max_pages].
      successors: None unless `Needs.successors` asks for them.
    """

    slot: jax.Array | None
    tokens: jax.Array
    following: jax.Array
    root: jax.Array
    start: jax.Array
    count: jax.Array
    features: tuple[jax.Array, ...]
    page_table: jax.Array
    successors: Successors | None = None


@dataclasses.dataclass(frozen=True)
class Level:
    """Nodes to run through a drafter, all at one depth.

    E counts the nodes below the root that were expanded before.

    Attributes:
      tokens: int32 [B, W].
      parents: int32 [B, W], number of each node's parent in the order of expansion: 0
        is the root, then come the E nodes.
      depth: edges from the root, at least 1.
      mask: bool [B, W, E + W], which of the nodes expanded before, and of this level,
        lie between the root and a node, itself included.
    """

    tokens: jax.Array
    parents: jax.Array
    depth: int
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guesses:
    """What may follow each node of a level, from a drafter that scores few tokens.

    The tokens of a node that have a probability differ, and it sums to 1 at most.

    Attributes:
      tokens: int32 [B, W, K], in any order.
      log_prob: float32 [B, W, K], estimate of the log probability that the target takes
        the token once the node is right; -inf where there is no guess.
      source: int32 [B, W, K], where a guess comes from: a place in `Drafter.sources`.
    """

    tokens: jax.Array
    log_prob: jax.Array
    source: jax.Array


# What a drafter says of R = B·W nodes, B major: float32 logits [V, R], or guesses.
Scores = jax.Array | Guesses
# expand(level, scratch) -> scores after its nodes, scratch; the scratch holds what the
# drafter wants to remember of the nodes, None at first.
Expand = Callable[[Level, Any], tuple[Scores, Any]]


@dataclasses.dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at when it proposes.

    Attributes:
      target: the bound target, for drafters that share its embedding or head.
      vocab: V, of the target.
      active: bool [B]; what an idle slot proposes is thrown away, and its state must
        stay as it is.
      root: int32 [B], the newest emitted token.
      lengths: int32 [B], tokens before the root; the root's absolute position. 0 for
        an idle slot.
      page_table: int32 [B, max_pages], shared with the target.
      sampling: the requests' settings.
      randomness: of the step.
      proposal: how nodes are proposed, one of `acceptance.compatibility.PROPOSALS`.
      penalties: of the policy; None if no request has any.
      level_price: float32 [], tokens per text that a level has to add to be worth its
        time; for shapes that stop where none does (`drafting.levels`).
      temperature: of the drafter's own; None: that of the requests.
      adaptive: of the policy; None if no request has any.
    """

    target: Transformer | None
    vocab: int
    active: jax.Array
    root: jax.Array
    lengths: jax.Array
    page_table: jax.Array
    sampling: Sampling
    randomness: Randomness
    proposal: str
    penalties: Penalties | None = None
    level_price: jax.Array | float = 0.0
    temperature: AdaptiveTemperature | None = None
    adaptive: Adaptive | None = None


class Drafter(Protocol):
    """Pure functions over a state of the drafter's own; every shape is static.

    See the module's text for an example.

    Attributes:
      module: the NNX module whose parameters the drafter uses, or None.
      needs: what it wants to be given.
      sources: names of where its nodes come from, for statistics (`TokenTree.source`).
      tau: temperature of its estimate that a child is right (`drafting.growth`).
      Options: frozen dataclass of its settings, from `SpeculativeConfig.options`.
    """

    module: nnx.Module | None
    needs: Needs
    sources: tuple[str, ...]
    tau: float
    Options: ClassVar[type]

    @classmethod
    def make(cls, model: Transformer | None, tau: float, options: Any) -> Drafter:
        """A drafter over a model of its own, if it has one, with its `Options`."""

    def with_module(self, module: nnx.Module | None) -> Drafter:
        """The same drafter over other parameters (those bound inside a jit)."""

    def init(self, sizes: Sizes) -> Any:
        """An empty state, a pytree of arrays and `Pages`."""

    def ingest(self, state: Any, committed: Committed) -> Any:
        """Takes in tokens that were committed, of a prompt or of a step.

        A chunk that starts at position 0 begins a new text in its slot. Slots whose
        count is 0 keep their state.
        """

    def propose(
        self, state: Any, shape: TreeShape, context: DraftContext
    ) -> tuple[TokenTree, Any]:
        """A tree of the given shape below the root."""

    def copy_slot(self, state: Any, source: jax.Array, destination: jax.Array) -> Any:
        """The state with one slot's part (int32 []) copied over another's.

        Pages are not copied: both slots' page tables name them.
        """

    def copy_pages(self, state: Any, copies: Copies) -> Any:
        """The state with pages copied, of all that it keeps by page."""

    def resume(self, state: Any, committed: Committed) -> Any:
        """Takes in the beginning of a text that is in the caches already.

        What the state keeps by page is there; features and successors are not given. At
        least one token of the text follows, by `ingest`. The state after both must
        draft as if all had been ingested.
        """


class PatientDrafter(Drafter, Protocol):
    """One that need not run its model in plain steps (`Needs.waits`).

    `postpone` stands in for a proposal of the root alone, as often as the backlog has
    room for `Sizes.window` more tokens. Before a tree is grown, and when there is no
    room, `catch_up` takes in the backlog; the state is then as if nothing had waited.
    """

    def postpone(self, state: Any, context: DraftContext) -> Any:
        """The state once what waits for the next proposal has joined the backlog."""

    def catch_up(self, state: Any, page_table: jax.Array, active: jax.Array) -> Any:
        """The state once the backlog has gone through the model.

        Args:
          state: of all slots.
          page_table: int32 [B, max_pages].
          active: bool [B]; the other slots keep their state.
        """

    def narrowed(
        self, state: Any, width: int, page_table: jax.Array, active: jax.Array
    ) -> Any:
        """The state with room for no more than so many tokens that wait.

        Trees are grown behind those that the tree before emitted: the fewer levels they
        have, the fewer rows the model's first pass needs. What is too much goes through
        the model.

        Args:
          state: of all slots, with an empty backlog.
          width: tokens that a step may emit.
          page_table: int32 [B, max_pages].
          active: bool [B]; what waits in the other slots may be lost.
        """

    def widened(self, state: Any, window: int) -> Any:
        """The state with room for so many tokens that wait again."""
