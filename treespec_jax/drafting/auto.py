"""Everything that drafts, in one tree: the default where no drafter is named.

One node budget for all sources: long matches are copied (`ngram.Matching`), recycled
successors and runners-up of the newest token fill the rest, and so does a draft model
if there is one. No source has a share of its own: each guess is worth what guesses of
its kind have come true lately, and the tree takes the likeliest paths. Where every slot
copies a long match, the model does not run below its roots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.branches import branch
from treespec_jax.checks import check_int
from treespec_jax.drafting import growth
from treespec_jax.drafting.draft_model import DraftModel, DraftModelState
from treespec_jax.drafting.eagle import Eagle
from treespec_jax.drafting.guessing import best_guesses
from treespec_jax.drafting.last_logits import LastLogits
from treespec_jax.drafting.ngram import Matching
from treespec_jax.drafting.protocol import DraftContext, Guesses, Level
from treespec_jax.drafting.recycle import Recycling
from treespec_jax.drafting.sources import (
    SourceDrafter,
    SourcesState,
    together,
)
from treespec_jax.models.eagle import EagleModel
from treespec_jax.trees.shapes import ROOT_ONLY

# Best tokens of a draft model that become guesses.
MODEL_GUESSES = 8
# Weight of the other sources' guesses beside a model that is sure.
LEAST_REST = 0.1
# A match from this length on is copied without asking the model.
LONG = 10


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
    """The method "auto" without a draft model; see `protocol.Drafter`."""

    Options = AutoOptions

    @classmethod
    def make(cls, model, tau, options: AutoOptions):
        parts = (
            Matching("suffix", options.longest, options.history),
            Recycling(options.successors, "engine"),
            LastLogits(options.candidates),
        )
        if model is None:
            return cls(parts)
        drafts = Eagle if isinstance(model, EagleModel) else DraftModel
        return AutoWithModel(parts, drafts(model, tau))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AutoState:
    """Of the sources, and of the draft model."""

    sources: SourcesState
    model: DraftModelState


class AutoWithModel(SourceDrafter):
    """The same with a draft model; see `protocol.Drafter`.

    Args:
      parts: the sources.
      model: drafts by passes of a model, or of one layer.
    """

    def __init__(self, parts, model: DraftModel):
        super().__init__(parts, model.tau)
        self.sources = (*self.sources, *model.sources)
        self.needs = dataclasses.replace(
            self.needs,
            feature_layers=model.needs.feature_layers,
            in_pages=True,
            next_tokens=model.needs.next_tokens,
            waits=True,
        )
        self._model = model
        self.module = model.module

    def with_module(self, module):
        return AutoWithModel(self.parts, self._model.with_module(module))

    def init(self, sizes) -> AutoState:
        return AutoState(super().init(sizes), self._model.init(sizes))

    def ingest(self, state: AutoState, committed) -> AutoState:
        sources = super().ingest(state.sources, committed)
        return AutoState(sources, self._model.ingest(state.model, committed))

    def copy_slot(self, state: AutoState, source, destination) -> AutoState:
        sources = super().copy_slot(state.sources, source, destination)
        model = self._model.copy_slot(state.model, source, destination)
        return AutoState(sources, model)

    def copy_pages(self, state: AutoState, copies) -> AutoState:
        sources = super().copy_pages(state.sources, copies)
        return AutoState(sources, self._model.copy_pages(state.model, copies))

    def resume(self, state: AutoState, committed) -> AutoState:
        sources = super().resume(state.sources, committed)
        return AutoState(sources, self._model.resume(state.model, committed))

    def postpone(self, state: AutoState, context: DraftContext) -> AutoState:
        sources, *_ = self.look(state.sources, ROOT_ONLY, context)
        return AutoState(sources, self._model.postpone(state.model, context))

    def catch_up(self, state: AutoState, page_table, active) -> AutoState:
        model = self._model.catch_up(state.model, page_table, active)
        return dataclasses.replace(state, model=model)

    def narrowed(self, state: AutoState, width: int, page_table, active) -> AutoState:
        model = self._model.narrowed(state.model, width, page_table, active)
        return dataclasses.replace(state, model=model)

    def widened(self, state: AutoState, window: int) -> AutoState:
        return dataclasses.replace(
            state, model=self._model.widened(state.model, window)
        )

    def propose(self, state: AutoState, shape, context: DraftContext):
        sources, root, expand = self.look(state.sources, shape, context)
        logits_VB, run, finish = self._model.begin(state.model, context)
        copying = self._copying(sources, context)

        shared = context.proposal == "shared"
        noise_CVB = context.randomness.noise_rows() if shared else None

        def expand_both(level: Level, scratch):
            known, rows = scratch or (None, None)
            guesses, known = expand(level, known)

            def ask():
                logits_VR, after = run(level, rows)
                noise_VB = None if noise_CVB is None else noise_CVB[level.depth]
                return self._guesses(logits_VR, noise_VB, context), after

            def skip():
                like = jax.eval_shape(ask)
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

            # Without conditionals the model is asked for nothing.
            straight = context.sampling.known.straight
            model, rows = branch(False if straight else copying, skip, ask)
            silent = jnp.where(copying, -jnp.inf, model.log_prob)
            model = dataclasses.replace(model, log_prob=silent)
            return _beside(model, guesses), (known, rows)

        if expand is not None:
            noise_VB = None if noise_CVB is None else noise_CVB[0]
            said = self._guesses(logits_VB, noise_VB, context)
            root = _beside(said, root)
        tree = growth.grow(shape, context, root, expand_both, self.tau)
        return tree, AutoState(sources, finish(tree))

    def _copying(self, state: SourcesState, context: DraftContext) -> jax.Array:
        """bool []: whether every slot at work has a long match."""
        lengths_B = jnp.max(state.parts[0].found.lengths, axis=1)
        return jnp.all((lengths_B >= LONG) | ~context.active)

    def _guesses(self, logits_VR, noise_VB, context: DraftContext) -> Guesses:
        """The model's best tokens, with the noise of their position if it is shared."""
        return best_guesses(
            logits_VR,
            noise_VB,
            context.sampling,
            MODEL_GUESSES,
            self.tau,
            source=len(self.parts),
        )


def _beside(model: Guesses, others: Guesses) -> Guesses:
    """The guesses of a model, and of others what it leaves over.

    It has read the text, and they have not: what it thinks unlikely is unlikely. A
    silent model leaves all of it.
    """
    rest_BW1 = 1.0 - jnp.sum(jnp.exp(model.log_prob), axis=2, keepdims=True)
    log_BWK = others.log_prob + jnp.log(jnp.maximum(rest_BW1, LEAST_REST))
    return together([model, dataclasses.replace(others, log_prob=log_BWK)])
