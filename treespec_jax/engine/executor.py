"""Weights, device state and compiled programs: the device's half of the engine."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.branches import is_straight
from treespec_jax.cache import pages as paging
from treespec_jax.cache.pages import Copies
from treespec_jax.config import EngineConfig
from treespec_jax.distributed import is_multiprocess
from treespec_jax.drafting.protocol import Sizes
from treespec_jax.engine import beam_step, compile_time, placement, rehearsal, sharing
from treespec_jax.engine import step as stepping
from treespec_jax.engine.background import Background
from treespec_jax.engine.beam_step import Looked, Moves, Sight
from treespec_jax.engine.chooser import Program
from treespec_jax.engine.clock import SteadyClock
from treespec_jax.engine.costs import CATCH_UP, PREFILL, REHEARSAL
from treespec_jax.engine.device_arguments import (
    batched,
    chunk_arguments,
    control_of,
    pair_arrays,
    variant_of,
)
from treespec_jax.engine.expectation import observed_shapes
from treespec_jax.engine.plan import ChunkPlan, ExtendPlan, ForkPlan, MovePlan, Plan
from treespec_jax.engine.sharing import Additions
from treespec_jax.engine.state import Control, DecodeState, Outbox
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import Pages
from treespec_jax.sampling import policy
from treespec_jax.sampling.penalties import TextSoFar
from treespec_jax.sampling.temperature import Adaptive
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape

# Numbers in a row of a TPU's vector registers.
TPU_LANES = 128
# Pages that one call copies at most.
_PAGE_COPIES = 64


class Executor:
    """Runs plans. Calls return before the device is done.

    Args:
      target: the model whose text is wanted; its parameters may be abstract,
        to compile ahead of time and for nothing else.
      speculation: see `speculation.Speculation`.
      config: fixed sizes.
      num_pages: pages that slots may own.
      clock: stands still while a call compiles its program.

    Attributes:
      compilations: times that each kind of program was traced and compiled.
      background: compiles programs while others run.
      platform: kind of the device, such as "cpu".

    Raises:
      UserError: target and drafter lie on different devices; a model that cannot be
        computed with as `EngineConfig.exact` says.
    """

    def __init__(
        self,
        target: Transformer,
        speculation: Speculation,
        config: EngineConfig,
        num_pages: int,
        clock: SteadyClock,
    ):
        self.config = config
        self._clock = clock
        self.compilations: collections.Counter[str] = collections.Counter()
        module = speculation.drafter.module
        target = placement.in_arithmetic(target, config.exact)
        self._speculation = speculation
        self._target, self._draft = FlatModule(target), FlatModule(module)
        self._placement = placement.placement(target, module)
        self.platform = placement.platform(target)
        self._layout = paging.CacheLayout(
            num_pages + 1,
            config.page_size,
            config.cache_dtype,
            config.lanes or (TPU_LANES if self.platform == "tpu" else 1),
            self._placement,
        )
        self._straight = is_straight(placement.device(target))
        # A state bound to no device becomes bound in its first call, and the second
        # would compile again.
        first = self._target.leaves[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            state = jax.eval_shape(self._begin, self._leaves)
            self._state = placement.described(state, self._placement.mesh)
        else:
            self._fresh_state = jax.jit(self._begin)
            self.reset()
        self._prefill = jax.jit(self._traced_prefill, donate_argnums=1)
        self._resume = self._jitted("resume", sharing.resume)
        self._fork = self._jitted("fork", sharing.fork)
        self._copy_pages = jax.jit(self._traced_copy, donate_argnums=0)
        self._extend = jax.jit(
            self._traced_extend, donate_argnums=1, static_argnames="scored"
        )
        self._look = jax.jit(
            self._traced_look, donate_argnums=1, static_argnames=("shape", "count")
        )
        self._go = self._jitted("go", beam_step.go)
        self._scores = jax.jit(sharing.scores)
        catch_up = self._jitted("catch_up", stepping.catch_up)
        self._programs: dict[Program, Callable] = {CATCH_UP: catch_up}
        # What stays on the device between the halves of a pass of beam search.
        self._looked: Looked | None = None
        # Programs that are compiled, by name and variant; and variants of which all
        # are that will be used.
        self._compiled: set[tuple[Program, Hashable]] = set()
        self._warm: set[Hashable] = set()
        self.background = Background()

    def reset(self) -> None:
        """Empties the caches, and all that the drafter has learnt."""
        # Two of them may not fit.
        self._state = None
        with compile_time.measured(self._clock):
            state = self._fresh_state(self._leaves)
        if self._placement.mesh is None:
            state = jax.device_put(state, self._target.leaves[0].sharding)
        self._state = state

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Of the devices that share the model; None: one device."""
        return self._placement.mesh

    @property
    def lost(self) -> bool:
        """Whether a call failed that had taken the state; waits for the device."""
        leaves = jax.tree.leaves(self._state)
        if not leaves or any(leaf.is_deleted() for leaf in leaves):
            return True
        try:
            jax.block_until_ready(leaves)
        except Exception:
            return True
        return False

    def prefill(self, chunk: ChunkPlan) -> Any:
        """Puts a chunk of a text into the caches, and waits until it is there.

        Returns:
          `PromptScores` of NumPy arrays, if the chunk asks for them, else None.
        """
        args = self._leaves, self._state, *chunk_arguments(chunk)
        with compile_time.measured(self._clock):
            self._state, scores = self._prefill(*args)
        self._compiled.add((PREFILL, chunk.variant))
        jax.block_until_ready(self._state.root)
        return jax.device_get(scores)

    def resume(self, chunk: ChunkPlan) -> None:
        """Tells the drafter of a chunk that is in the caches already."""
        self._change(self._resume, *chunk_arguments(chunk))

    def fork(self, plan: ForkPlan) -> None:
        """Copies slots, and the pages that they do not share."""
        slots = Copies(*pair_arrays(plan.slots, self.config.max_batch))
        for pages in batched(plan.pages, _PAGE_COPIES):
            copies = Copies(*pair_arrays(pages, _PAGE_COPIES))
            self._change(self._fork, slots, copies)

    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        """Copies pages of the target over others: source and destination each."""
        for pairs in batched(pages, _PAGE_COPIES):
            copies = Copies(*pair_arrays(pairs, _PAGE_COPIES))
            with compile_time.measured(self._clock):
                self._set_pages(self._copy_pages(self._state.pages, copies))

    def extend(self, plan: ExtendPlan) -> tuple[np.ndarray, np.ndarray | None]:
        """Adds tokens to cached texts.

        Returns:
          float32 logits [W, V] after the last token of each, and log p [W, T - 1] of
          the tokens but the first; None if they were not wanted.
        """
        added = Additions(plan.tokens, plan.starts, plan.counts, plan.page_table)
        state = self._target.leaves, self._state.pages
        with compile_time.measured(self._clock):
            pages, done = self._extend(*state, added, scored=plan.scored)
        self._set_pages(pages)
        done = jax.device_get(done)
        return done.logits, done.log_probs

    def scores(
        self,
        logits: np.ndarray,
        position: int,
        sampling: Mapping[str, np.ndarray],
        text: Mapping[str, np.ndarray] | None,
        adaptive: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """float32 [V], of which plain decoding emits the best.

        Args:
          logits: float32 [V], the target's there.
          position: absolute.
          sampling: fields of `Sampling`, of one text.
          text: fields of `TextSoFar`, likewise; None without penalties.
          adaptive: fields of `Adaptive`, likewise; None without one.
        """
        with compile_time.measured(self._clock):
            found = self._scores(
                logits[None],
                np.array([position], np.int32),
                policy.from_host(sampling, self._straight),
                TextSoFar.of(text) if text is not None else None,
                Adaptive(**adaptive) if adaptive is not None else None,
            )
            return jax.device_get(found)

    def look(self, plan: Plan, count: int) -> Sight:
        """The first half of a pass of beam search, with trees of the first shape.

        Args:
          plan: whose limits say which slots have a beam.
          count: N, tokens to tell of after every node.

        Returns:
          what the host has to see, as NumPy arrays.
        """
        given = self._leaves, self._state, self._control(plan)
        shape = self._speculation.shape
        with compile_time.measured(self._clock):
            found = self._look(*given, shape=shape, count=count)
        self._state, self._looked, sight = found
        return jax.device_get(sight)

    def go(self, plan: MovePlan) -> None:
        """The second half, in the trees that `look` grew."""
        size = self.config.max_batch
        slots = Copies(*pair_arrays(plan.fork.slots, size))
        pages = Copies(*pair_arrays(plan.fork.pages, size))
        parts = plan.origin, plan.path, plan.emitted, plan.count, plan.page_table
        self._change(self._go, self._looked, Moves(*parts, slots, pages))
        self._looked = None

    def _change(self, program: Callable, *args) -> None:
        """Runs a program that makes another state of ours, and no more."""
        with compile_time.measured(self._clock):
            self._state = program(self._leaves, self._state, *args)

    def _set_pages(self, pages: Pages) -> None:
        self._state = dataclasses.replace(self._state, pages=pages)

    def dispatch(self, plan: Plan, name: Program) -> Outbox:
        """Starts a dispatch; its outbox is still on the device.

        Args:
          plan: who runs.
          name: shape of its trees, or REHEARSAL: plain steps, and before them a tree
            that nobody verifies.
        """
        program, control = self._program(name), self._control(plan)
        with compile_time.measured(self._clock):
            self._state, outbox = program(self._leaves, self._state, control)
        self._compiled.add((name, variant_of(control)))
        return outbox

    def catch_up(self, plan: Plan, wait: bool) -> None:
        """Takes in what waits for the drafter's model; may wait until it is done."""
        control = self._control(plan)
        self._change(self._program(CATCH_UP), control)
        self._compiled.add((CATCH_UP, variant_of(control)))
        if wait:
            jax.block_until_ready(self._state.root)

    def variant(self, plan: Plan) -> Hashable:
        """What a plan's programs hang on besides their names, such as penalties."""
        return variant_of(self._control(plan))

    def ready(self, variant: Hashable) -> set[Program]:
        """Programs that are compiled in a variant, of a dispatch or of a chunk."""
        # A thread may add to the second one meanwhile: a list is made at once.
        compiled = [*self._compiled, *self.background.done]
        return {program for program, other in compiled if other == variant}

    def refused(self, variant: Hashable) -> set[Program]:
        """Programs that cannot be compiled."""
        failed = [*self.background.failed]
        return {program for program, other in failed if other == variant}

    def is_warm(self, variant: Hashable) -> bool:
        """Whether all programs are compiled that will be used."""
        return variant in self._warm

    def compile(
        self,
        plans: Sequence[Plan],
        programs: Sequence[Program],
        chunks: Sequence[ChunkPlan],
        warm: bool,
    ) -> None:
        """Compiles some programs and prefills of some sizes, and no more.

        Compilers keep one core busy: the programs are compiled side by side, the
        largest first.

        Args:
          plans: of dispatches, one of each variant.
          programs: by name.
          chunks: of prompts.
          warm: no others will be used.
        """
        state = self._leaves, self._state
        jobs = [
            (self._program(name), (*state, self._control(plan)))
            for plan in plans
            for name in programs
        ]
        jobs += [
            (self._resume if c.cached else self._prefill, (*state, *chunk_arguments(c)))
            for c in chunks
        ]
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            # Tracing is Python, and goes on while the last ones compile.
            under_way = [
                pool.submit(program.lower(*args).compile) for program, args in jobs
            ]
            for job in under_way:
                job.result()
        variants = {self.variant(plan) for plan in plans}
        self._compiled |= {(name, v) for name in programs for v in variants}
        self._compiled |= {(PREFILL, c.variant) for c in chunks if not c.cached}
        self._warm |= variants if warm else set()

    def compile_behind(self, plan: Plan, name: Program) -> None:
        """Compiles a program while others run, if none is being compiled."""
        if self.background.busy:
            return
        # The state's arrays are given away meanwhile; what they are like stays.
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self._state,
        )
        program, args = self._program(name), (self._leaves, state, self._control(plan))

        def job():
            program.lower(*args).compile()

        self.background.start((name, self.variant(plan)), job)

    def program(
        self, plan: Plan, shape: TreeShape, straight: bool | None = None
    ) -> tuple[Callable, tuple]:
        """The function of a dispatch and its arguments, to compile ahead of time.

        The second argument, the state, is donated.

        Args:
          plan: with the sampling settings of the program.
          shape: of its trees.
          straight: whether it must have no conditional (`branches.Known`); None: as
            where the weights lie.
        """
        straight = self._straight if straight is None else straight
        control = control_of(plan, straight)
        control = placement.described(control, self._placement.mesh)
        return self._traced_dispatch(shape), (self._leaves, self._state, control)

    @property
    def draft_state(self) -> Any:
        """The drafter's state after all dispatches."""
        return self._state.draft

    def draft_leaves(self, state: Any) -> dict[int, Any]:
        """Arrays of a drafter's state, by number, that are not those of ours."""
        pairs = zip(
            jax.tree.leaves(state), jax.tree.leaves(self._state.draft), strict=True
        )
        changed = {i: new for i, (new, old) in enumerate(pairs) if new is not old}
        return jax.device_get(changed) if is_multiprocess() else changed

    def set_draft_leaves(self, leaves: Mapping[int, Any]) -> None:
        """Replaces arrays of the drafter's state; see `draft_leaves`."""
        old, structure = jax.tree.flatten(self._state.draft)
        new = [
            jax.device_put(leaves[i], leaf.sharding) if i in leaves else leaf
            for i, leaf in enumerate(old)
        ]
        draft = jax.tree.unflatten(structure, new)
        self._state = dataclasses.replace(self._state, draft=draft)

    def _control(self, plan: Plan) -> Control:
        return control_of(plan, self._straight)

    def _program(self, name: Program) -> Callable:
        if name not in self._programs:
            run = self._traced_dispatch(name)
            self._programs[name] = jax.jit(run, donate_argnums=1)
        return self._programs[name]

    @property
    def _leaves(self):
        return self._target.leaves, self._draft.leaves

    def _bind(self, leaves) -> tuple[Transformer, Speculation]:
        target_leaves, draft_leaves = leaves
        module = self._draft.bind(draft_leaves)
        return self._target.bind(target_leaves), self._speculation.with_module(module)

    def _begin(self, leaves) -> DecodeState:
        self.compilations["begin"] += 1
        target, speculation = self._bind(leaves)
        B = self.config.max_batch
        steps = self.config.steps_per_dispatch
        sizes = Sizes(
            batch=B,
            max_len=self.config.max_len,
            depth=speculation.depth,
            window=rehearsal.window(speculation, steps),
            backlog=rehearsal.backlog(speculation, steps),
            resumes=self.config.prefix_cache,
            layout=self._layout,
            vocab=target.config.vocab_size,
        )
        state = DecodeState(
            pages=paging.empty_pages(target.config, self._layout),
            lengths=jnp.zeros(B, jnp.int32),
            root=jnp.zeros(B, jnp.int32),
            ended=jnp.zeros(B, bool),
            draft=speculation.drafter.init(sizes),
        )
        return placement.pin(state, self._placement.mesh)

    def _traced_prefill(self, leaves, state, *args):
        self.compilations["prefill"] += 1
        done = stepping.prefill(*self._bind(leaves), state, *args)
        return placement.pin(done, self._placement.mesh)

    def _jitted(self, name: str, change: Callable) -> Callable:
        """The program of a change of the speculation's state, and no more."""

        def run(leaves, state, *args) -> DecodeState:
            self.compilations[name] += 1
            _, speculation = self._bind(leaves)
            state = change(speculation, state, *args)
            return placement.pin(state, self._placement.mesh)

        return jax.jit(run, donate_argnums=1)

    def _traced_copy(self, pages, copies) -> Pages:
        self.compilations["copy"] += 1
        return placement.pin(paging.copy(pages, copies), self._placement.mesh)

    def _traced_extend(self, leaves, pages, additions, scored):
        self.compilations["extend"] += 1
        target = self._target.bind(leaves)
        done = sharing.extend(target, pages, additions, scored)
        return placement.pin(done, self._placement.mesh)

    def _traced_look(self, leaves, state, control, shape, count):
        self.compilations["look"] += 1
        state, looked, sight = beam_step.look(
            self._bind(leaves), shape, count, state, control
        )
        state, sight = placement.pin((state, sight), self._placement.mesh)
        return state, looked, sight

    def _traced_dispatch(self, name: Program) -> Callable:
        shapes, rehearsed = self._speculation.shapes, None
        if name == REHEARSAL:
            layered = self._speculation.drafter.module is not None
            name, rehearsed = shapes[-1], observed_shapes(shapes, layered)[-1]

        def run(leaves, state, control):
            self.compilations["rehearsal" if rehearsed else "dispatch"] += 1
            models = self._bind(leaves)
            done = stepping.dispatch(
                models, name, state, control, self.config, rehearsed
            )
            return placement.pin(done, self._placement.mesh)

        return run


def fetch(outbox: Outbox) -> Any:
    """The outbox as NumPy arrays; waits for its dispatch."""
    return jax.device_get(outbox)
