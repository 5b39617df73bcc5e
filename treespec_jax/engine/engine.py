"""The loop between scheduler and executor."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from treespec_jax import distributed, limits
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine import first_costs, flights, warming
from treespec_jax.engine.beam_group import Found, GroupSearch
from treespec_jax.engine.beams import BeamParams
from treespec_jax.engine.branching import CachedTexts
from treespec_jax.engine.chooser import Chooser
from treespec_jax.engine.costs import CATCH_UP, Costs, usual_curve
from treespec_jax.engine.device_arguments import REPEATED
from treespec_jax.engine.executor import Executor, fetch
from treespec_jax.engine.expectation import observed_shapes
from treespec_jax.engine.first_costs import Prescribed, Texts
from treespec_jax.engine.plan import DraftCache, Plan
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler
from treespec_jax.engine.timing import Choice
from treespec_jax.engine.under_way import UnderWay
from treespec_jax.engine.warming import Idle
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling import constraints
from treespec_jax.speculation import PLAIN, Speculation
from treespec_jax.trees.shapes import TreeShape

GREEDY = SamplingParams()


class Engine:
    """Continuous batching of speculative decoding over a fixed number of slots.

    Args:
      target: the model whose text is wanted.
      config: fixed sizes.
      speculation: what drafts and what decides.
      eos_ids: tokens that end a text, unless a request ignores them.
      costs: of steps, to choose shapes by; None: nothing is known beforehand.

    Attributes:
      prefill_seconds: wall time spent in prefill, without compiling.
      decode_seconds: wall time spent in decoding, without compiling.
      vocab_size: V.

    Raises:
      UserError: a tree that is deeper than max_len, or a target and a drafter on
        different devices.
    """

    def __init__(
        self,
        target: Transformer,
        config: EngineConfig,
        speculation: Speculation = PLAIN,
        eos_ids: Sequence[int] = (),
        costs: Costs | None = None,
    ):
        limits.check_tree(speculation.depth, config.max_len)
        self.config = config
        self.speculation = speculation
        self.prefill_seconds = self.decode_seconds = 0.0
        self.vocab_size, self._eos_ids = target.config.vocab_size, tuple(eos_ids)
        self._backlog = flights.BacklogLimits.of(speculation, config.steps_per_dispatch)
        drafted = DraftCache.of(speculation.drafter.needs, self._backlog.trails)
        self._scheduler = Scheduler(
            config, eos_ids, speculation.depth + 1, self.vocab_size, drafted
        )
        self._clock = self._scheduler.clock
        self._idle = Idle(config, eos_ids, self.vocab_size)
        # Whether a drafter has to be told of beginnings that are in the caches.
        self._resumes = config.prefix_cache and drafted.hears_all
        executor = Executor(
            target, speculation, config, self._scheduler.num_pages, self._clock
        )
        self._executor = distributed.repeated(executor, REPEATED, executor.mesh)
        pages = self._scheduler.pages
        self._texts = CachedTexts(
            config, pages.allocator, pages.prefixes, drafted.in_pages, self._executor
        )
        layered = speculation.drafter.module is not None
        cpu = self._executor.platform == "cpu"
        costs = costs or Costs(usual_curve(cpu, layered), config.max_batch)
        steps = config.steps_per_dispatch
        self._chooser = Chooser(speculation.shapes, costs, layered, steps)
        self._flights = UnderWay(self._executor, self._backlog, self._clock)
        self._observed = observed_shapes(speculation.shapes, layered)
        # Slots whose requests end if what runs now fails; None: all.
        self._concerned: Iterable[int] | None = None
        self._prepare: Callable[[Any], Any] | None = None
        self._used = False

    @property
    def compilations(self) -> collections.Counter[str]:
        """Times that each kind of program was traced and compiled."""
        return self._executor.compilations

    @property
    def compile_seconds(self) -> float:
        """Wall time spent on tracing, compiling and reading compiled programs."""
        return self._clock.compile_seconds

    @property
    def costs(self) -> Costs:
        """What steps cost, as far as is known."""
        return self._chooser.costs

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.busy

    @property
    def is_new(self) -> bool:
        """Whether no text has begun since it was made or reset."""
        return not self._used and not self._texts.count

    @property
    def free_pages(self) -> int:
        """Pages that belong to no request."""
        return self._scheduler.free_pages

    @property
    def draft_state(self) -> Any:
        """The drafter's state, as all dispatches under way will leave it.

        Another one of the same arrays' shapes and places may be set. The next dispatch
        takes it away from whoever still holds it. No later text begins with cached
        pages of earlier ones then: a drafter keeps its share of them in its state.
        """
        return self._executor.draft_state

    @draft_state.setter
    def draft_state(self, state: Any) -> None:
        self._scheduler.forget_prefixes()
        self._executor.set_draft_leaves(self._executor.draft_leaves(state))

    def begin_with(self, prepare: Callable[[Any], Any]) -> None:
        """Sets how the drafter begins, now and after every `reset`.

        Args:
          prepare: takes the state of a drafter that has seen nothing, and returns the
            one to begin with, see `draft_state`.
        """
        self._prepare = prepare
        if not distributed.is_follower():
            self.draft_state = prepare(self.draft_state)

    def program(
        self, params: SamplingParams = GREEDY, straight: bool | None = None
    ) -> tuple[Callable, tuple]:
        """The function of a dispatch and its arguments, to compile ahead of time.

        The second argument, the state, is donated. An engine of abstract models
        (`Transformer` without `rngs`) can do this and nothing else.

        Args:
          params: of every request, where programs are compiled for them.
          straight: see `Executor.program`.
        """
        plan = self._scheduler.idle_plan().asking(params)
        return self._executor.program(plan, self.speculation.shape, straight)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that cannot run.

        An empty prompt, or one without room for a new token; tokens that the model
        lacks; settings that forbid every token; a function of logits that fails.
        """
        limits.check_prompt(request.prompt, self.config.max_len)
        self.check_params(request.params)

    def check_params(self, params: SamplingParams) -> None:
        """Raises UserError for settings that no request can have, whatever its prompt.

        Args:
          params: bad words among them are token ids.
        """
        limits.check_params(params, self.vocab_size, self._eos_ids)
        limits.check_policy(params, self.speculation.shapes)
        chain, length = params.logits_processors, self.config.max_len
        constraints.check(chain, length, self.vocab_size)

    def submit(self, request: Request) -> None:
        """Queues a request; raises what `check` raises."""
        self.check(request)
        cache_dtype = self.config.cache_dtype
        request.stats.begin(self.speculation, cache_dtype, request.params)
        self._scheduler.submit(request)
        self._used = True

    def cancel(self, request: Request, finish_reason: str = "stop") -> None:
        """Ends a request where it stands and frees its slot."""
        self._scheduler.cancel(request, finish_reason)

    def scores(
        self, tokens: Sequence[int], prompt: int, logits: np.ndarray, params
    ) -> np.ndarray:
        """float32 [V], of which plain decoding emits the best after a text.

        Log p of the policy up to a constant, plus the noise of the position.

        Args:
          tokens: of the text, of which the first `prompt` are the prompt.
          prompt: tokens of it.
          logits: float32 [V], the target's after the text.
          params: `SamplingParams`.
        """
        settings = self._idle.after(tokens, prompt, params)
        return self._executor.scores(logits, len(tokens), **settings)

    def fork(self, request: Request, params: SamplingParams | None = None) -> Request:
        """A second request that goes on from where one stands, in a slot of its own.

        It shares the full pages of the first, and its drafter knows as much. Nothing is
        computed.

        Args:
          request: that decodes.
          params: of the new one; None: the same, so that it repeats its twin.

        Raises:
          UserError: no slot or too few pages are free, or the request does not decode.
        """
        self.drain()
        fork, plan = self._scheduler.fork(request, params or request.params)
        with self._recovery():
            self._concerned = [destination for _, destination in plan.slots]
            self._executor.fork(plan)
        return fork

    def reset(self) -> None:
        """Forgets all texts, and what the drafter has learnt of them.

        Raises:
          ValueError: a request waits or runs, or a branch is open.
        """
        self._check_idle()
        self._begin()
        self._chooser.reset()

    def _check_idle(self) -> None:
        """Raises ValueError as `reset`; afterwards no dispatch is under way."""
        if self.busy:
            raise ValueError("requests are under way; end them first")
        if self._texts.count:
            raise ValueError(f"{self._texts.count} branches are open; prune them first")
        # A dispatch may have been started ahead of a text that then ended.
        self.drain()

    def measure_costs(
        self, seconds: float = 3.0, params: SamplingParams = GREEDY
    ) -> float:
        """Learns what steps of all compiled shapes cost, before texts pay for that.

        Texts of its own run (`engine.first_costs`), and nothing is compiled. All that
        `reset` forgets is forgotten. Costs are kept, for other processes too.

        Args:
          seconds: to spend, about; each shape is compared once at least.
          params: that all was compiled for, see `compile`.

        Returns:
          seconds that it took, which count as compiling; 0.0 if all shapes that are
          compiled have comparisons enough, or there is no choice.

        Raises:
          ValueError: as `reset`.
          Exception: what `advance` raises.
        """
        self._check_idle()
        plan = self._scheduler.idle_plan().asking(params)
        ready = self._executor.ready(self._executor.variant(plan))
        given = self.speculation.shapes, self.config, ready, bool(self._backlog.size)
        chooser, prescribed = self._chooser, Prescribed(self._chooser, *given)
        texts = Texts(self, params, self._executor.ready)
        if not (prescribed.is_needed and texts.fit):
            return 0.0
        # Beside a program that is being compiled nothing is timed.
        self.wait()
        began, times = self.compile_seconds, (self.prefill_seconds, self.decode_seconds)
        with self._clock.stopped():
            try:
                self._scheduler.forget_prefixes()
                self._chooser = prescribed
                first_costs.run(self, prescribed, texts, seconds)
            finally:
                # Whatever ended it, at any place: Control-C too.
                self._chooser = chooser
                texts.cancel()
                self._flights.clear()
                self._begin()
                chooser.reset()
                self.prefill_seconds, self.decode_seconds = times
        self.costs.keep()
        return self.compile_seconds - began

    def compile(
        self,
        chunks: Sequence[int] = (),
        every_shape: bool = True,
        resuming: bool = False,
        request: Request | None = None,
        params: SamplingParams = GREEDY,
    ) -> None:
        """Compiles programs side by side, which else their first use does in turn.

        Args:
          chunks: sizes of prefills, of `EngineConfig.prefill_chunks`.
          every_shape: all that a full batch may use; nothing is compiled later. Else
            what decoding begins with: plain steps, if these are among the shapes.
          resuming: also what tells a drafter of cached beginnings, if it has to be.
          request: also what one with its settings runs.
          params: how every slot samples without a request; see `program`.
        """
        params = params if request is None else request.params
        plans = self._idle.plans(self._scheduler.idle_plan().asking(params), request)
        shapes, programs = self.speculation.shapes, [self.speculation.shapes[-1]]
        if every_shape:
            sizes = self.config.max_batch, bool(self._backlog.size)
            programs = warming.programs(self._chooser, shapes, *sizes)
        pieces = self._idle.chunks(chunks, resuming and self._resumes, request)
        with self._clock.stopped():
            self._executor.compile(plans, programs, pieces, every_shape)

    def advance(
        self, max_steps: int | None = None, shape: TreeShape | None = None
    ) -> list[Request]:
        """Admits what fits, and takes in what one dispatch emitted.

        Where nothing that a dispatch emits can decide who runs next, the next one is
        started before the results are read, so that the device does not wait.

        Args:
          max_steps: steps to run at most; None: the compiled number.
          shape: to grow, one of the speculation's; None: the quicker one.

        Returns:
          Requests that emitted something or finished.

        Raises:
          Exception: whatever failed: compiling, memory, the device. The requests that
            it concerned have ended with "error": the one that was to enter a slot or
            whose text was being prefilled, or those of the dispatch, or all in slots if
            the state on the device was lost. Their pages are free, and the next call
            goes on with the others.
        """
        with self._recovery():
            return self._advance(max_steps, shape)

    @contextlib.contextmanager
    def cached_texts(self) -> Iterator[CachedTexts]:
        """The texts in the cache that callers advance themselves.

        Should the state on the device be lost, all of them are closed.
        """
        with self._recovery():
            self._concerned = ()
            yield self._texts

    def search(self, requests: Sequence[Request], params: BeamParams) -> list[Found]:
        """Beam search (`GroupSearch.run`), while no request waits or runs."""
        shape = self.speculation.shape
        search = GroupSearch(params, self._scheduler, self._executor, shape)
        with self._recovery():
            return search.run(requests, self.submit, self._prefill, self._eos_ids)

    @contextlib.contextmanager
    def _recovery(self) -> Iterator[None]:
        """Ends the requests that a failure concerns; makes a state if it was lost."""
        self._concerned = None
        try:
            yield
        except Exception:
            lost = self._executor.lost
            for request in self._scheduler.running(None if lost else self._concerned):
                self._scheduler.cancel(request, "error")
            if lost or self._concerned is None:
                self._flights.clear()
            if lost:
                self._begin()
            raise

    def _begin(self) -> None:
        self._used = False
        self._texts.release_all()
        self._scheduler.forget_prefixes()
        self._executor.reset()
        if self._prepare is not None:
            self.draft_state = self._prepare(self.draft_state)

    def _advance(self, max_steps, shape) -> list[Request]:
        began, prefilled = self._clock.now(), self.prefill_seconds
        touched = self._scheduler.end_late()
        if not self._flights:
            touched += self._prefill()
            choice = self._choose(max_steps, shape)
            plan, ended = self._scheduler.plan(choice.max_steps)
            touched += ended
            self._launch(plan, choice)
        if self._flights:
            choice = self._choose(max_steps, shape)
            self._launch(self._scheduler.plan_ahead(choice.max_steps), choice)
            touched += self._land()
            touched += self._scheduler.end_late()
            spent = self._clock.now() - began
            self.decode_seconds += spent - (self.prefill_seconds - prefilled)
        return touched

    @property
    def compiling(self) -> bool:
        """Whether a program is being compiled beside others."""
        return self._executor.background.busy

    def wait(self) -> None:
        """Waits until no program is being compiled beside others."""
        self._executor.background.wait()

    def drain(self) -> None:
        """Waits for dispatches under way, and enters what they emitted.

        Raises:
          Exception: what `advance` raises.
        """
        with self._recovery():
            while self._flights:
                self._land()

    def _choose(self, max_steps: int | None, shape: TreeShape | None) -> Choice:
        """What the next dispatch does."""
        if shape is not None or len(self.speculation.shapes) == 1:
            return Choice(shape or self.speculation.shape, max_steps)
        plan, executor = self._scheduler.preview(), self._executor
        requests = [slot.request for slot in plan.slots.values()]
        variant = executor.variant(plan)
        ready = executor.ready(variant)
        if not executor.is_warm(variant):
            known = ready | executor.refused(variant)
            wanted = self._chooser.wanted(requests, known)
            if wanted is not None:
                # What any tree and any rehearsal begin with.
                first = CATCH_UP if self._backlog.size else wanted
                executor.compile_behind(plan, wanted if first in known else first)
        return self._chooser.choose(max_steps, requests, ready, self._flights.choices)

    def _launch(self, plan: Plan | None, choice: Choice) -> None:
        if plan is None:
            return
        requests = [slot.request for slot in plan.slots.values()]
        load = self._chooser.load(requests)
        plan = self._chooser.priced(plan, choice.shape)
        try:
            self._flights.launch(plan, choice, load)
        except BaseException:
            self._scheduler.abandon(plan)
            raise
        self._chooser.started(choice, requests)

    def _land(self) -> list[Request]:
        # An interrupt while this waits loses nothing: the dispatch is still listed.
        done = fetch(self._flights.oldest.outbox)
        flight, seconds = self._flights.land()
        if len(self.speculation.shapes) > 1:
            flights.tell(self._chooser, self._observed, flight, done, seconds)
        return self._scheduler.file(flight.plan, done, flight.nodes)

    def _prefill(self) -> list[Request]:
        """A chunk of every new text, and more until somebody can decode."""
        # Whoever cannot enter has no slot.
        self._concerned = ()
        refused = self._scheduler.admit()
        while chunks := self._scheduler.chunks():
            for chunk in chunks:
                self._concerned = (chunk.slot,)
                began = self._clock.now()
                scores = None
                if chunk.cached:
                    self._executor.resume(chunk)
                else:
                    scores = self._executor.prefill(chunk)
                seconds = self._clock.now() - began
                self._scheduler.fed(chunk, seconds, scores)
                self.prefill_seconds += seconds
            refused += self._scheduler.end_late()
            if self._scheduler.ready:
                break
            # Some wait for what others have just put into the cache.
            self._concerned = ()
            refused += self._scheduler.admit()
        self._concerned = None
        return refused
