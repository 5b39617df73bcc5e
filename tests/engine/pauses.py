"""Dispatches in which slots pause: between steps, for whole dispatches, and at random.

A slot pauses where its limit lies: at the end of its pages, in the middle of a dispatch
that goes on for others. Where limits are set between steps of an unpaused run, no step
is cut short and the steps of both runs can be compared one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.config import EngineConfig
from treespec_jax.drafting.draft_model import DraftModelState
from treespec_jax.drafting.eagle import EagleState
from treespec_jax.drafting.matches import Matches
from treespec_jax.drafting.protocol import Drafter
from treespec_jax.drafting.rates import Rates
from treespec_jax.drafting.recycle import RecycleState, table_of, with_table
from treespec_jax.engine import rehearsal
from treespec_jax.engine.executor import Executor, fetch
from treespec_jax.engine.plan import idle_chunk, prefill_plan
from treespec_jax.engine.scheduler import Scheduler
from treespec_jax.models.transformer import Transformer
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape

B, MAX_LEN, CHUNK, STEPS = 3, 64, 4, 4
CONFIG = EngineConfig(
    max_batch=B,
    max_len=MAX_LEN,
    page_size=8,
    steps_per_dispatch=STEPS,
    prefill_chunks=(CHUNK,),
)
# A greedy slot beside sampled ones.
SAMPLING = {
    "temperature": np.array([0.0, 0.7, 1.0], np.float32),
    "top_k": np.array([0, 0, 4], np.int32),
    "top_p": np.array([1.0, 0.9, 1.0], np.float32),
    "seed": np.array([3, 4, 5], np.uint32),
}


class Untaught:
    """A drafter that learns nothing of what all slots share.

    Else what a slot drafts depends on what the others did before, and it may.

    Args:
      drafter: any.
      seed: of the successors that a shared table holds from the beginning.
    """

    def __init__(self, drafter: Drafter, seed: int = 0):
        self._drafter, self._seed = drafter, seed

    def __getattr__(self, name):
        return getattr(self._drafter, name)

    def with_module(self, module):
        return Untaught(self._drafter.with_module(module), self._seed)

    def init(self, sizes):
        state = self._drafter.init(sizes)
        table = table_of(self._drafter, state)
        if table is None:
            return state
        rng, shape = np.random.default_rng(self._seed), table.best.shape[1:]
        order = np.argsort(rng.random((shape[0], sizes.vocab)))[:, : shape[1]]
        logits = -np.sort(rng.exponential(size=shape))
        return with_table(state, order.astype(np.int32), logits.astype(np.float32))

    def ingest(self, state, committed):
        after = self._drafter.ingest(state, committed)
        return jax.tree.map(self._as_before, state, after, is_leaf=self._shared)

    def _as_before(self, before, after):
        if isinstance(after, RecycleState) and self._is_shared_table(after):
            return before
        if isinstance(after, RecycleState):
            return dataclasses.replace(after, rates=before.rates)
        return before if isinstance(after, Rates) else after

    @staticmethod
    def _shared(x) -> bool:
        return isinstance(x, (Rates, RecycleState))

    def _is_shared_table(self, state: RecycleState) -> bool:
        return state.best.shape[0] == 1


@dataclasses.dataclass
class Text:
    """What a slot said.

    Attributes:
      prompt: token ids.
      tokens: emitted so far.
      ends: length of the cache after each step, the prompt's first.
      log_probs: of the tokens, by the target.
    """

    prompt: list[int]
    tokens: list[int]
    ends: list[int]
    log_probs: list[float]

    @property
    def length(self) -> int:
        return self.ends[-1]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of one shape, which every slot takes before anybody takes the next."""

    shape: TreeShape
    steps: int


class Bench:
    """Slots with prompts over one executor.

    Args:
      target: the model.
      speculation: whose drafter becomes `Untaught`.
    """

    def __init__(self, target: Transformer, speculation: Speculation):
        drafter = Untaught(speculation.drafter)
        self.speculation = dataclasses.replace(speculation, drafter=drafter)
        self._scheduler = Scheduler(
            CONFIG, (), speculation.depth + 1, target.config.vocab_size
        )
        pages = self._scheduler.num_pages
        self._waits = rehearsal.backlog(speculation, STEPS) > 0
        self._executor = Executor(
            target, self.speculation, CONFIG, pages, self._scheduler.clock
        )
        self._table = np.arange(1, pages + 1, dtype=np.int32).reshape(B, -1)
        assert TRASH_PAGE not in self._table

    @property
    def draft_state(self) -> Any:
        """Of the drafter, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._executor.draft_state)

    def begin(self, prompts: Sequence[list[int]]) -> list[Text]:
        """Texts of which nothing is prefilled; their slots still hold the last ones."""
        return [Text(prompt, [], [len(prompt) - 1], []) for prompt in prompts]

    def pieces(self, text: Text) -> list[tuple[int, int, int]]:
        """Chunks of a prompt, see `prefill_plan`."""
        return prefill_plan(len(text.prompt) - 1, CONFIG.prefill_chunks)

    def prefill(self, slot: int, text: Text, piece: tuple[int, int, int]) -> None:
        """Takes in a chunk of a slot's prompt."""
        start, size, count = piece
        tokens, following = np.zeros((2, 1, size), np.int32)
        tokens[0, :count] = text.prompt[start : start + count]
        following[0, :count] = text.prompt[start + 1 : start + count + 1]
        chunk = dataclasses.replace(
            idle_chunk(size, CONFIG),
            slot=slot,
            tokens=tokens,
            following=following,
            root=np.array([text.prompt[start + count]], np.int32),
            start=np.array([start], np.int32),
            count=np.array([count], np.int32),
            page_table=self._table[slot : slot + 1],
        )
        self._executor.prefill(chunk)

    def dispatch(self, texts: Sequence[Text], shape, limits, steps: int) -> None:
        """Runs steps of slots up to their limits, and enters what they said.

        Args:
          texts: of the slots.
          shape: one of the speculation's.
          limits: tokens that each may hold afterwards; a slot with as many is idle.
          steps: to run at most.
        """
        plan = self._scheduler.idle_plan()
        plan = dataclasses.replace(
            plan,
            page_table=self._table,
            limits=np.array(limits, np.int32),
            want_logprobs=np.ones(B, bool),
            sampling={**plan.sampling, **SAMPLING},
            max_steps=np.array(steps, np.int32),
        )
        if self._waits and shape.depth:
            self._executor.catch_up(plan, wait=True)
        emission = fetch(self._executor.dispatch(plan, shape)).emission
        for slot, text in enumerate(texts):
            counts_S = emission.counts[:steps, slot]
            for step in np.flatnonzero(counts_S):
                some = step, slot, slice(counts_S[step])
                text.tokens += emission.tokens[some].tolist()
                text.log_probs += emission.logprobs[some].tolist()
                text.ends.append(text.length + int(counts_S[step]))


def unpaused(bench: Bench, prompts, phases: Sequence[Phase]) -> list[Text]:
    """All prompts first, then all steps of all slots at once."""
    texts = bench.begin(prompts)
    for slot, text in enumerate(texts):
        for piece in bench.pieces(text):
            bench.prefill(slot, text, piece)
    for phase in phases:
        for start in range(0, phase.steps, STEPS):
            steps = min(STEPS, phase.steps - start)
            bench.dispatch(texts, phase.shape, [MAX_LEN] * B, steps)
    return texts


def paused(
    bench: Bench, whole: Sequence[Text], phases, seed: int, cut: bool = False
) -> list[Text]:
    """The same at random: who takes how many steps of a dispatch, and who waits.

    Prompts are taken in by pieces between the dispatches of the others.

    Args:
      bench: as of `unpaused`.
      whole: what that gave.
      phases: likewise.
      seed: of the pauses.
      cut: whether a limit may lie within a step; else it lies between two.
    """
    rng = np.random.default_rng(seed)
    texts = bench.begin([text.prompt for text in whole])
    waiting = [bench.pieces(text) for text in texts]
    last = 0
    for phase in phases:
        last += phase.steps
        ends = [text.ends[last] for text in whole]
        while any(t.length < end for t, end in zip(texts, ends, strict=True)):
            slot = int(rng.integers(B))
            if waiting[slot]:
                bench.prefill(slot, texts[slot], waiting[slot].pop(0))
            limits = [0] * B
            for slot, text in enumerate(texts):
                if waiting[slot]:
                    continue
                more = int(rng.integers(STEPS + 1))
                if cut:
                    limits[slot] = min(text.length + more, ends[slot])
                else:
                    done = len(text.ends) - 1
                    limits[slot] = whole[slot].ends[min(done + more, last)]
            steps = int(rng.integers(1, STEPS + 1))
            bench.dispatch(texts, phase.shape, limits, steps)
    return texts


def by_slot(state: Any) -> list[np.ndarray]:
    """What a drafter remembers of each slot, arrays with a leading axis B.

    Matches are those of the last step's roots, and found anew in the next. Of what
    waits only the first `pending_count` are real, of a table what has logits, and of a
    backlog nothing once a tree is to be grown.
    """

    def remembered(x):
        if isinstance(x, Matches):
            return None
        if isinstance(x, RecycleState):
            return np.where(x.logits > -np.inf, x.best, 0), x.logits
        real_BC = np.arange(x.pending.shape[1]) < x.pending_count[:, None]
        x = dataclasses.replace(
            x, pending=np.where(real_BC, x.pending, 0), backlog=None
        )
        if isinstance(x, EagleState):
            hidden = np.where(real_BC[:, :, None], x.hidden, 0)
            x = dataclasses.replace(x, hidden=hidden)
        return [getattr(x, field.name) for field in dataclasses.fields(x)]

    def special(x):
        return isinstance(x, (Matches, RecycleState, DraftModelState))

    state = jax.tree.map(
        lambda x: remembered(x) if special(x) else x, state, is_leaf=special
    )
    return [x for x in jax.tree.leaves(state) if x.shape[:1] == (B,)]
