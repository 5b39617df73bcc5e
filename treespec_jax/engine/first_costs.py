"""What steps of all shapes cost, learnt before texts have to pay for it.

Texts of nobody run in all slots. Their dispatches are prescribed, round by round: each
compiled shape, a rehearsal, and the plain steps that `engine.timing` compares them
with. The chooser hears of them afterwards, as if they had followed each other: of the
medians of several rounds, since single dispatches differ by a third where other
programs share the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.chooser import Chooser, Program
from treespec_jax.engine.costs import (
    CATCH_UP,
    COMPARISONS,
    CONTEXT,
    PREFILL,
    REHEARSAL,
    Load,
)
from treespec_jax.engine.plan import prefill_plan
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import LONG, Choice
from treespec_jax.trees.shapes import TreeShape

# Seconds that a dispatch of plain steps is to take, if a step takes less.
DISPATCH = 0.02
# Rounds at most. A comparison is one of medians, of every fifth round.
PARTS = COMPARISONS
ROUNDS = 3 * PARTS
# Rehearsals of a round, whose times are small differences.
REHEARSALS = 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """Dispatches that should take as long as each other.

    Attributes:
      program: that runs.
      steps: of it.
      before: the program of the dispatch before.
    """

    program: Program
    steps: int
    before: Program


class Prescribed:
    """Stands in for an engine's chooser, and gathers how long dispatches take.

    Args:
      chooser: of the engine.
      shapes: that it chooses from, the last one plain.
      config: of the engine.
      ready: programs that are compiled; no others run.
      waits: whether tokens of plain steps wait for the drafter's model, so that a pass
        that takes them in comes between them and a tree.

    Attributes:
      is_needed: whether some tree lacks comparisons, those of earlier processes
        included.
      ended: whether all is started that was prescribed.
    """

    def __init__(
        self,
        chooser: Chooser,
        shapes: Sequence[TreeShape],
        config: EngineConfig,
        ready: Collection[Program],
        waits: bool,
    ):
        self._chooser, self._plain, self._waits = chooser, shapes[-1], waits
        self._load = Load.of(config.max_batch, 0)
        self._rehearses = REHEARSAL in ready
        runs = self._plain in ready and (CATCH_UP in ready or not waits)
        trees = [shape for shape in shapes[:-1] if runs and shape in ready]
        counts = {s: chooser.costs.count(s, self._load) for s in trees}
        self.is_needed = any(count < COMPARISONS for count in counts.values())
        # What has comparisons enough of earlier runs needs no more.
        self._trees = [shape for shape in trees if counts[shape] < COMPARISONS]
        # Steps of dispatches: all; those beside trees; few, that show what is no step.
        self._many = self._brief = config.steps_per_dispatch
        self._few = max(1, min(2, self._many // 2))
        # Whether all that is no step is nothing beside one, see `engine.timing`.
        self._long = False
        self._next: Choice | None = None
        self._choices: Iterator[Choice | None] = iter(())
        self._round, self._before = 0, self._plain
        self._times: dict[Kind, list[tuple[int, float]]] = {}
        self.ended = False
        # What an engine asks of a chooser besides.
        self.load, self.priced, self.costs = chooser.load, chooser.priced, chooser.costs

    @property
    def pauses(self) -> bool:
        """Whether it goes on with new texts."""
        return self._next is None and not self.ended

    def begin(self, texts: Texts, until: float) -> None:
        """Prescribes the first dispatch.

        Args:
          texts: that run.
          until: a moment of `time.perf_counter`, after which only the first round goes
            on.
        """
        self._choices = self._all(texts, until)
        self.go_on()

    def go_on(self) -> None:
        """Prescribes the next dispatch: that was started, or there are new texts."""
        self._next = next(self._choices, None)

    def choose(self, *_: Any) -> Choice:
        """See `Chooser.choose`."""
        return self._next or Choice(self._plain, 1)

    def wanted(self, *_: Any) -> None:
        """See `Chooser.wanted`; nothing is compiled."""

    def started(self, choice: Choice, requests: Collection[Request]) -> None:
        """See `Chooser.started`."""
        if choice is self._next:
            self.go_on()

    def record(
        self, choice: Choice, observed: Any, steps: int, load: Load, seconds: Any
    ) -> None:
        """See `Chooser.record`."""
        program = REHEARSAL if choice.rehearse else choice.shape
        kind, self._before = Kind(program, steps, self._before), program
        if steps and seconds and load == self._load:
            self._times.setdefault(kind, []).append((self._round, seconds))

    def rehearsed(self, observed: Any) -> None:
        """See `Chooser.rehearsed`; nobody's texts tell of others."""

    def _all(self, texts: Texts, until: float) -> Iterator[Choice | None]:
        """All dispatches; None where new texts are needed first."""
        # A first run does more than to run.
        if self._rehearses:
            yield Choice(self._plain, 1, rehearse=True)
        # The fourth one is timed, and two are started before that is known.
        yield from self._plainly(1, times=6)
        step = self._median(Kind(self._plain, 1, self._plain))
        if step:
            self._long = step > LONG
            self._brief = min(self._many, max(1, int(DISPATCH / step)))
            self._few = 1 if self._long else self._few
        for self._round in range(1, ROUNDS + 1):
            yield from self._besides(texts)
            for shape in self._trees:
                yield from self._beside(texts, shape)
                if self._round > 1 and time.perf_counter() > until:
                    break
            if time.perf_counter() > until:
                break
        self.ended = True

    def _besides(self, texts: Texts) -> Iterator[Choice | None]:
        """What tells of all that is no step of a tree."""
        yield from self._with_room(texts, self._plain, self._many + 4)
        yield from self._plainly(self._few)
        if not self._long:
            yield from self._plainly(self._many)
            yield from self._plainly(self._few)
        for _ in range(REHEARSALS if self._rehearses else 0):
            yield Choice(self._plain, self._few, rehearse=True)
            yield from self._plainly(self._few, times=2)
        yield from self._plainly(self._brief)
        if self._waits:
            yield from self._plainly(1)

    def _beside(self, texts: Texts, shape: TreeShape) -> Iterator[Choice | None]:
        """A tree beside plain steps."""
        yield from self._with_room(texts, shape, self._brief)
        # Behind another one, as most are: before the first, weights of the drafter have
        # left the processor's caches, and what waits for its model is taken in.
        yield Choice(shape, 1)
        yield Choice(shape, self._brief)
        yield from self._plainly(self._brief, times=1 if self._long else 2)
        if self._waits:
            # The pass for what waits, before the next tree, spoils the time of this.
            yield from self._plainly(1)

    def _plainly(self, steps: int, times: int = 1) -> Iterator[Choice]:
        for _ in range(times):
            yield Choice(self._plain, steps)

    def _with_room(
        self, texts: Texts, shape: TreeShape, steps: int
    ) -> Iterator[Choice | None]:
        """Asks for new texts where too little room is left for trees of that shape."""
        # The tree, plain dispatches behind it, and those under way.
        needed = (steps + 1) * (shape.depth + 1) + 5 * steps
        if texts.begun and texts.room < needed:
            yield None
            # Which nothing is compared with.
            yield from self._plainly(1, times=2)

    def tell(self, requests: Collection[Request]) -> None:
        """Lets the chooser hear of all that was gathered.

        Args:
          requests: of the dispatches.
        """
        plain, few, brief = self._plain, self._few, self._brief
        parts = sorted({n % PARTS for times in self._times.values() for n, _ in times})
        for shape in self._trees:
            self._tell(requests, (shape, 1, None))
        many = Kind(plain, self._many, plain)
        for part in parts if self._many > few and not self._long else ():
            short = plain, few, self._median(Kind(plain, few, plain), part=part)
            long = plain, self._many, self._median(many, part=part)
            self._tell(requests, long, short, long)
        usual = self._median(Kind(plain, few, plain))
        rehearsals = self._times.get(Kind(REHEARSAL, few, plain), ())
        behind = self._times.get(Kind(plain, few, REHEARSAL), ())
        for (_, one), (_, other) in zip(rehearsals, behind, strict=False):
            sequence = (REHEARSAL, few, one), (plain, few, other)
            self._tell(requests, (plain, few, usual), *sequence)
        for part, shape in itertools.product(parts, self._trees):
            kinds = [Kind(plain, brief, plain)]
            switched, tree = Kind(plain, brief, shape), Kind(shape, brief, shape)
            if self._long:
                kinds += [Kind(plain, brief, other) for other in self._trees]
            rest = plain, brief, self._median(*kinds, part=part)
            self._tell(requests, rest, (shape, brief, self._median(tree, part=part)))
            if not self._long:
                first = plain, brief, self._median(switched, part=part)
                self._tell(requests, (shape, brief, None), first, rest)

    def _median(self, *kinds: Kind, part: int | None = None) -> float | None:
        """Seconds of dispatches of these kinds; None if none was timed."""
        times = [one for kind in kinds for one in self._times.get(kind, ())]
        found = [seconds for n, seconds in times if part in (None, n % PARTS)]
        return statistics.median(found) if found else None

    def _tell(
        self,
        requests: Collection[Request],
        *sequence: tuple[Program, int, float | None],
    ) -> None:
        """Lets the chooser hear of dispatches behind each other.

        Args:
          requests: of them.
          *sequence: programs, steps and seconds.
        """
        # Behind one that is not timed.
        for program, steps, seconds in ((self._plain, 1, None), *sequence):
            shape = self._plain if program == REHEARSAL else program
            tree = shape != self._plain
            choice = Choice(shape, steps, program == REHEARSAL, timing=tree)
            self._chooser.started(choice, requests)
            self._chooser.record(choice, [], steps, self._load, seconds)


class Texts:
    """Requests of nobody, one for each slot.

    Args:
      engine: `engine.Engine`, unused.
      params: whose sampling they have, and nothing else.
      compiled: programs that are compiled in a variant, `Executor.ready`.

    Attributes:
      requests: under way.
      fit: whether there is room for them, and a program to prefill them.
    """

    def __init__(
        self,
        engine: Any,
        params: SamplingParams,
        compiled: Callable[[Hashable], Collection[Program]],
    ):
        self._engine, config = engine, engine.config
        self._numbers = itertools.count()
        self.requests: list[Request] = []
        pages = engine.free_pages // config.max_batch
        # Of one class of context, and none has to wait for pages.
        limit = min(config.max_len, pages * config.page_size, CONTEXT - 1)
        self._prompt = _prompt_tokens(config.prefill_chunks, compiled)
        self.fit = self._prompt is not None and self._prompt < limit
        if self.fit:
            self._params = SamplingParams(
                max_tokens=limit - self._prompt,
                temperature=params.temperature,
                adaptive_temperature=params.adaptive_temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                ignore_eos=True,
            )

    @property
    def begun(self) -> bool:
        """Whether any has grown."""
        return any(request.tokens for request in self.requests)

    @property
    def room(self) -> int:
        """Tokens that the longest may still emit."""
        longest = max(len(request.tokens) for request in self.requests)
        return self._params.max_tokens - longest

    @property
    def ended(self) -> bool:
        """Whether one has found no more room."""
        return any(request.finish_reason for request in self.requests)

    def cancel(self) -> None:
        """Ends them where they stand."""
        for request in self.requests:
            self._engine.cancel(request)

    def renew(self) -> None:
        """Begins others, when those before have ended."""
        self.cancel()
        self._engine.drain()
        self.requests = [self._request() for _ in range(self._engine.config.max_batch)]
        for request in self.requests:
            self._engine.submit(request)

    def _request(self) -> Request:
        """One that begins like no other."""
        number, size = next(self._numbers), self._engine.vocab_size
        first = number % size, number // size % size
        return Request([*first, *[0] * (self._prompt - 2)], self._params)


def run(engine: Any, prescribed: Prescribed, texts: Texts, seconds: float) -> None:
    """Runs what is prescribed, for about so many seconds.

    Args:
      engine: `engine.Engine`, whose chooser is `prescribed`.
      prescribed: that has not begun.
      texts: of the engine.
      seconds: to spend.
    """
    until = time.perf_counter() + seconds
    texts.renew()
    prescribed.begin(texts, until)
    while not prescribed.ended:
        if prescribed.pauses or texts.ended:
            texts.renew()
        if prescribed.pauses:
            prescribed.go_on()
        engine.advance()
    engine.drain()
    prescribed.tell(texts.requests)


def _prompt_tokens(
    chunks: Sequence[int], compiled: Callable[[Hashable], Collection[Program]]
) -> int | None:
    """Of the shortest prompt whose prefill is compiled; None if there is none."""
    for rows in sorted({1, *((size + 1) // 2 for size in chunks)}):
        (_, size, _), *more = prefill_plan(rows, chunks)
        if not more and PREFILL in compiled((size, None)):
            return rows + 1
    return None
