"""Slots, pages and requests on the host; compiled steps on the device."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.acceptance import facts, penalties
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.exact import ExactMatch
from treespec_jax.acceptance.policy import Sampling
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.cache import pages as paging
from treespec_jax.cache.allocator import PageAllocator
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.drafting.protocol import Drafter
from treespec_jax.engine import placing
from treespec_jax.engine import step as stepping
from treespec_jax.engine.state import Control, DecodeState
from treespec_jax.engine.stats import Stats
from treespec_jax.errors import UserError
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.tuning.calibration import TreeRecord

# Numbers in a row of a TPU's vector registers.
TPU_LANES = 128


@dataclasses.dataclass(eq=False)
class Request:
    """One text in the making.

    Attributes:
      prompt: token ids, at least one.
      params: what was asked for.
      tokens: ids emitted so far.
      logprobs: log p of each, if asked for.
      finish_reason: None while running; then "stop" (end-of-text token or a stop text)
        or "length" (max_tokens, max_len or no free page).
      stats: counts and times.
      records: of every step's tree, if the engine keeps them.
      steps: ranks of the nodes that each step accepted, see `Stats.record_step`.
    """

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats = dataclasses.field(default_factory=Stats)
    records: list[TreeRecord] = dataclasses.field(default_factory=list)
    steps: list[list[int]] = dataclasses.field(default_factory=list)

    def cut(self, tokens: int) -> None:
        """Ends the text after `tokens` tokens, as if no more had been emitted."""
        while self.stats.tokens > tokens:
            ranks = self.steps.pop()
            self.stats.take_back(ranks)
            left = tokens - self.stats.tokens
            if left > 0:
                self.steps.append(ranks[: left - 1])
                self.stats.record_step(ranks[: left - 1])
        del self.tokens[tokens:]
        del self.logprobs[tokens:]
        del self.records[len(self.steps) :]


@dataclasses.dataclass
class _Slot:
    request: Request
    pages: list[int]
    length: int
    limit: int
    started: float


class Engine:
    """Continuous batching of speculative decoding over a fixed number of slots.

    Args:
      target: the model whose text is wanted.
      drafter: see `drafting.protocol.Drafter`.
      config: fixed sizes.
      eos_ids: tokens that end a text, unless a request ignores them.
      rule: which drafted tokens are kept, see `acceptance.protocol`.
      cascade: a lossy policy between drafter and target, see `acceptance.cascade`.
      record: keep what became of every tree in `Request.records`.

    Attributes:
      compilations: times that each function was traced and compiled.
      prefill_seconds: wall time spent in prefill.
      decode_seconds: wall time spent in dispatches.

    Raises:
      UserError: a tree that is deeper than max_len, one that the rule would not be
        lossless for, or a target and a drafter on different devices.
    """

    def __init__(
        self,
        target: Transformer,
        drafter: Drafter,
        config: EngineConfig,
        eos_ids: Sequence[int] = (),
        rule: Rule | None = None,
        cascade: Cascade | None = None,
        record: bool = False,
    ):
        rule = rule or ExactMatch()
        if drafter.draws is not None:
            name = cascade.name if cascade else ""
            facts.choose_draws(rule.name, drafter.draws, drafter.shape, name)
        if drafter.depth >= config.max_len:
            raise UserError(
                f"a tree of depth {drafter.depth} does not fit max_len={config.max_len}"
            )
        self.config = config
        self.drafter = drafter
        self.rule = rule
        self.cascade = cascade
        self.record = record
        self._eos_ids = tuple(eos_ids)
        self._target = FlatModule(target)
        self._draft = FlatModule(drafter.module)
        self._place = placing.placement(target, drafter.module)
        lanes = config.lanes or (TPU_LANES if placing.on_tpu(target) else 1)
        self._pages_per_slot = -(-config.max_len // config.page_size)
        num_pages = config.num_pages or config.max_batch * self._pages_per_slot
        self._allocator = PageAllocator(num_pages)
        self._slots: list[_Slot | None] = [None] * config.max_batch
        self._waiting: collections.deque[Request] = collections.deque()
        self.compilations: collections.Counter[str] = collections.Counter()
        self.prefill_seconds = self.decode_seconds = 0.0

        B = config.max_batch
        self._page_table = np.full(
            (B, self._pages_per_slot), paging.TRASH_PAGE, np.int32
        )
        self._eos = np.full((B, max(1, len(self._eos_ids))), -1, np.int32)
        self._want_logprobs = np.zeros(B, bool)
        self._sampling = {
            "temperature": np.zeros(B, np.float32),
            "top_k": np.zeros(B, np.int32),
            "top_p": np.ones(B, np.float32),
            "min_p": np.zeros(B, np.float32),
            "seed": np.zeros(B, np.uint32),
        }
        self._penalties = penalties.Requests(B, config.max_len)

        layout = paging.CacheLayout(
            num_pages + 1,
            config.page_size,
            lanes,
            config.cache_dtype == "int8",
            self._place,
        )

        def begin(leaves):
            self.compilations["begin"] += 1
            target, drafter = self._bind(leaves)
            dtype = target.embedding[...].dtype
            state = DecodeState(
                pages=paging.empty_pages(target.config, layout, dtype),
                lengths=jnp.zeros(B, jnp.int32),
                root=jnp.zeros(B, jnp.int32),
                draft=drafter.begin(B, layout),
            )
            return placing.settle(state, self._place.mesh)

        # Where the weights are: a state that is bound to no device becomes bound in
        # its first call, and the second would compile again.
        first = self._target.leaves[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            state = jax.eval_shape(begin, self._leaves)
            self._state = placing.described(state, self._place.mesh)
        else:
            self._state = jax.jit(begin)(self._leaves)
            if self._place.mesh is None:
                self._state = jax.device_put(self._state, first.sharding)
        self._dispatch = jax.jit(self._traced_dispatch, donate_argnums=1)
        self._prefill = jax.jit(self._traced_prefill, donate_argnums=1)

    def _bind(self, leaves):
        target_leaves, draft_leaves = leaves
        return (
            self._target.bind(target_leaves),
            self.drafter.with_module(self._draft.bind(draft_leaves)),
        )

    def _traced_dispatch(self, leaves, state, control):
        self.compilations["dispatch"] += 1
        target, drafter = self._bind(leaves)
        steps = self.config.steps_per_dispatch
        done = stepping.dispatch(
            target, drafter, self.rule, state, control, steps, self.cascade, self.record
        )
        return placing.settle(done, self._place.mesh)

    def _traced_prefill(self, leaves, state, *args):
        self.compilations["prefill"] += 1
        state = stepping.prefill(*self._bind(leaves), state, *args)
        return placing.settle(state, self._place.mesh)

    @property
    def _leaves(self):
        return self._target.leaves, self._draft.leaves

    def program(self) -> tuple[Callable, tuple]:
        """The function of a dispatch and its arguments, to compile ahead of time.

        The second argument, the state, is donated. An engine of abstract models
        (`nnx.eval_shape`) can do this and nothing else.
        """
        control, _ = self._control(None)
        control = placing.described(control, self._place.mesh)
        return self._traced_dispatch, (self._leaves, self._state, control)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or any(self._slots)

    @property
    def free_pages(self) -> int:
        """Pages that belong to no request."""
        return self._allocator.free

    def check(self, request: Request) -> None:
        """Checks a request.

        Raises:
          UserError: an empty prompt, or one without room for a new token.
        """
        if not request.prompt:
            raise UserError("the prompt is empty; give at least one token")
        if len(request.prompt) >= self.config.max_len:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens, max_len is "
                f"{self.config.max_len}; shorten it or raise max_len"
            )

    def submit(self, request: Request) -> None:
        """Queues a request; raises what `check` raises."""
        self.check(request)
        request.stats.prompt_tokens = len(request.prompt)
        request.stats.rule = self.rule.name
        request.stats.cache_dtype = self.config.cache_dtype
        if self.cascade:
            request.stats.cascade = self.cascade.name
            request.stats.alpha = self.cascade.alpha
        request.stats.nodes = self.drafter.num_nodes - 1
        request.stats.emitted_counts = [0] * (self.drafter.depth + 2)
        self._waiting.append(request)

    def cancel(self, request: Request, finish_reason: str = "stop") -> None:
        """Ends a request where it stands and frees its slot."""
        if request in self._waiting:
            self._waiting.remove(request)
        for index, slot in enumerate(self._slots):
            if slot is not None and slot.request is request:
                self._release(index)
        request.finish_reason = request.finish_reason or finish_reason

    def advance(self, max_steps: int | None = None) -> list[Request]:
        """Admits what fits, runs one dispatch, and files what it emitted.

        Args:
          max_steps: steps to run at most; None: the compiled number.

        Returns:
          Requests that emitted something or finished.
        """
        touched = self._admit()
        control, starved = self._control(max_steps)
        touched += starved
        if not control.remaining.any():
            return touched
        begun = time.perf_counter()
        self._state, outbox = self._dispatch(self._leaves, self._state, control)
        outbox = jax.device_get(outbox)
        self.decode_seconds += time.perf_counter() - begun
        for index, slot in enumerate(self._slots):
            if slot is not None:
                self._file(index, slot, outbox)
                touched.append(slot.request)
        return touched

    def _admit(self) -> list[Request]:
        refused = []
        for index in range(self.config.max_batch):
            while self._slots[index] is None and self._waiting:
                request = self._waiting[0]
                # Room for the prompt and a first token; growth comes later.
                needed = self._pages_for(len(request.prompt))
                if needed > self._allocator.free:
                    if any(self._slots):
                        return refused
                    self._waiting.popleft()
                    request.finish_reason = "length"
                    refused.append(request)
                    continue
                self._waiting.popleft()
                self._insert(index, request, self._allocator.take(needed))
        return refused

    def _pages_for(self, rows: int) -> int:
        return min(-(-rows // self.config.page_size), self._pages_per_slot)

    def _insert(self, index: int, request: Request, pages: list[int]) -> None:
        begun = time.perf_counter()
        params, prompt = request.params, request.prompt
        self._page_table[index] = paging.TRASH_PAGE
        self._page_table[index, : len(pages)] = pages
        self._eos[index] = -1
        if not params.ignore_eos and self._eos_ids:
            self._eos[index] = self._eos_ids
        self._want_logprobs[index] = params.logprobs
        for name, values in self._sampling.items():
            values[index] = getattr(params, name)
        self._penalties.insert(index, params)
        for start, size, count in prefill_plan(
            len(prompt) - 1, self.config.prefill_chunks
        ):
            tokens = np.zeros((1, size), np.int32)
            tokens[0, :count] = prompt[start : start + count]
            self._state = self._prefill(
                self._leaves,
                self._state,
                np.int32(index),
                tokens,
                np.int32(start),
                np.int32(count),
                np.int32(prompt[start + count]),
                self._page_table[index : index + 1],
            )
        jax.block_until_ready(self._state.root)
        now = time.perf_counter()
        request.stats.prefill_seconds = now - begun
        self.prefill_seconds += now - begun
        limit = min(params.max_tokens, self.config.max_len - len(prompt))
        self._slots[index] = _Slot(request, pages, len(prompt) - 1, limit, now)

    def _control(self, max_steps: int | None):
        """Reserves pages for the next dispatch; ends requests that cannot grow."""
        most = self.config.steps_per_dispatch
        steps = most if max_steps is None else min(max_steps, most)
        remaining = np.zeros(self.config.max_batch, np.int32)
        starved = []
        for index, slot in enumerate(self._slots):
            if slot is None:
                continue
            left = slot.limit - len(slot.request.tokens)
            wish = min(left, steps * (self.drafter.depth + 1))
            more = self._pages_for(slot.length + wish) - len(slot.pages)
            if more > 0:
                pages = self._allocator.take(more)
                at = len(slot.pages)
                self._page_table[index, at : at + len(pages)] = pages
                slot.pages += pages
            room = len(slot.pages) * self.config.page_size - slot.length
            remaining[index] = min(left, room)
            if remaining[index] == 0:
                slot.request.finish_reason = "length"
                starved.append(slot.request)
                self._release(index)
        control = Control(
            page_table=self._page_table,
            remaining=remaining,
            eos=self._eos,
            sampling=Sampling(**self._sampling),
            want_logprobs=self._want_logprobs,
            max_steps=np.int32(steps),
            text=self._penalties.so_far(
                {
                    index: (slot.request.prompt, slot.request.tokens)
                    for index, slot in enumerate(self._slots)
                    if slot is not None
                }
            ),
        )
        return control, starved

    def _file(self, index: int, slot: _Slot, outbox) -> None:
        request = slot.request
        for at in range(int(outbox.steps)):
            count = int(outbox.counts[at, index])
            if count == 0:
                break
            request.tokens += outbox.tokens[at, index, :count].tolist()
            if request.params.logprobs:
                request.logprobs += outbox.logprobs[at, index, :count].tolist()
            ranks = outbox.ranks[at, index, : count - 1].tolist()
            request.steps.append(ranks)
            request.stats.record_step(ranks)
            if outbox.trees is not None:
                request.records.append(
                    TreeRecord(
                        outbox.trees.parents[at, index],
                        outbox.trees.log_chance[at, index],
                        outbox.trees.path[at, index],
                    )
                )
            slot.length += count
        request.stats.decode_seconds = time.perf_counter() - slot.started
        ends = () if request.params.ignore_eos else self._eos_ids
        if request.tokens and request.tokens[-1] in ends:
            request.finish_reason = "stop"
        elif len(request.tokens) >= slot.limit:
            request.finish_reason = "length"
        if request.finish_reason:
            self._release(index)

    def _release(self, index: int) -> None:
        slot = self._slots[index]
        self._allocator.give_back(slot.pages)
        self._page_table[index] = paging.TRASH_PAGE
        self._slots[index] = None


def prefill_plan(tokens: int, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cuts a prompt into compiled chunk sizes: (start, size, real tokens) each.

    A chunk of the next size up is used once it would be at least half full. A prompt
    of one token still makes one (empty) chunk, which places its root.
    """
    plan, start = [], 0
    while start < tokens or not plan:
        left = tokens - start
        size = max([c for c in chunks if c <= 2 * left] or [chunks[0]])
        count = min(size, left)
        plan.append((start, size, count))
        start += count
    return plan
