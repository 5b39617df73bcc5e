"""Weights, device state and compiled programs: the device's half of the engine."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import Chunk
from treespec_jax.config import EngineConfig
from treespec_jax.drafting.protocol import Sizes
from treespec_jax.engine import placement, rehearsal
from treespec_jax.engine import step as stepping
from treespec_jax.engine.plan import ChunkPlan, Plan
from treespec_jax.engine.state import Control, DecodeState, Outbox
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling.penalties import TextSoFar
from treespec_jax.sampling.policy import Sampling
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape

# Numbers in a row of a TPU's vector registers.
TPU_LANES = 128


class Executor:
    """Runs plans. Calls return before the device is done.

    Args:
      target: the model whose text is wanted; its parameters may be abstract,
        to compile ahead of time and for nothing else.
      speculation: see `speculation.Speculation`.
      config: fixed sizes.
      num_pages: pages that slots may own.

    Attributes:
      compilations: times that each kind of program was traced and compiled.

    Raises:
      UserError: target and drafter lie on different devices.
    """

    def __init__(
        self,
        target: Transformer,
        speculation: Speculation,
        config: EngineConfig,
        num_pages: int,
    ):
        self.config = config
        self.compilations: collections.Counter[str] = collections.Counter()
        module = speculation.drafter.module
        self._speculation = speculation
        self._target, self._draft = FlatModule(target), FlatModule(module)
        self._placement = placement.placement(target, module)
        self._layout = paging.CacheLayout(
            num_pages + 1,
            config.page_size,
            config.cache_dtype,
            config.lanes or (TPU_LANES if placement.on_tpu(target) else 1),
            self._placement,
        )
        # Where the weights are: a state that is bound to no device becomes bound in
        # its first call, and the second would compile again.
        first = self._target.leaves[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            state = jax.eval_shape(self._begin, self._leaves)
            self._state = placement.described(state, self._placement.mesh)
        else:
            self._fresh_state = jax.jit(self._begin)
            self.reset()
        self._prefill = jax.jit(self._traced_prefill, donate_argnums=1)
        self._dispatches: dict[TreeShape, Callable] = {}

    def reset(self) -> None:
        """Empties the caches, and all that the drafter has learnt."""
        # Two of them may not fit.
        self._state = None
        state = self._fresh_state(self._leaves)
        if self._placement.mesh is None:
            state = jax.device_put(state, self._target.leaves[0].sharding)
        self._state = state

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

    def prefill(self, chunk: ChunkPlan) -> None:
        """Puts a chunk of a text into the caches, and waits until it is there."""
        self._state = self._prefill(self._leaves, self._state, *_chunk(chunk))
        jax.block_until_ready(self._state.root)

    def dispatch(self, plan: Plan, shape: TreeShape, rehearse: bool = False) -> Outbox:
        """Starts a dispatch; its outbox is still on the device."""
        program, control = self._dispatch(shape), _control(plan, rehearse)
        self._state, outbox = program(self._leaves, self._state, control)
        return outbox

    def compile(
        self, plan: Plan, shapes: Sequence[TreeShape], chunks: Sequence[ChunkPlan]
    ) -> None:
        """Compiles dispatches of some shapes and prefills of some sizes, and no more.

        Compilers keep one core busy: the programs are compiled side by side, the
        largest first.
        """
        state = self._leaves, self._state
        jobs = [(self._dispatch(shape), (*state, _control(plan))) for shape in shapes]
        jobs += [(self._prefill, (*state, *_chunk(chunk))) for chunk in chunks]
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            # Tracing is Python, and goes on while the last ones compile.
            under_way = [
                pool.submit(program.lower(*args).compile) for program, args in jobs
            ]
            for job in under_way:
                job.result()

    def program(self, plan: Plan, shape: TreeShape) -> tuple[Callable, tuple]:
        """The function of a dispatch and its arguments, to compile ahead of time.

        The second argument, the state, is donated.
        """
        control = placement.described(_control(plan), self._placement.mesh)
        return self._traced_dispatch(shape), (self._leaves, self._state, control)

    @property
    def draft_state(self) -> Any:
        """The drafter's state after all dispatches; another of its kind may be set."""
        return self._state.draft

    @draft_state.setter
    def draft_state(self, state: Any) -> None:
        self._state = dataclasses.replace(self._state, draft=state)

    def _dispatch(self, shape: TreeShape) -> Callable:
        if shape not in self._dispatches:
            self._dispatches[shape] = jax.jit(
                self._traced_dispatch(shape), donate_argnums=1
            )
        return self._dispatches[shape]

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
        sizes = Sizes(
            batch=B,
            max_len=self.config.max_len,
            depth=speculation.depth,
            window=rehearsal.window(speculation, self.config.steps_per_dispatch),
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

    def _traced_prefill(self, leaves, state, *args) -> DecodeState:
        self.compilations["prefill"] += 1
        state = stepping.prefill(*self._bind(leaves), state, *args)
        return placement.pin(state, self._placement.mesh)

    def _traced_dispatch(self, shape: TreeShape) -> Callable:
        def run(leaves, state, control):
            self.compilations["dispatch"] += 1
            done = stepping.dispatch(
                *self._bind(leaves), shape, state, control, self.config
            )
            return placement.pin(done, self._placement.mesh)

        return run


def fetch(outbox: Outbox) -> Any:
    """The outbox as NumPy arrays; waits for its dispatch."""
    return jax.device_get(outbox)


def _chunk(chunk: ChunkPlan) -> tuple:
    """Arguments of a prefill behind the state."""
    rows = Chunk(chunk.tokens, chunk.start, chunk.count, chunk.page_table)
    return np.int32(chunk.slot), rows, (chunk.following, chunk.root)


def _control(plan: Plan, rehearse: bool = False) -> Control:
    return Control(
        page_table=plan.page_table,
        limits=plan.limits,
        eos=plan.eos,
        sampling=Sampling(**plan.sampling),
        want_logprobs=plan.want_logprobs,
        max_steps=plan.max_steps,
        rehearse=np.bool_(rehearse),
        text=TextSoFar(**plan.text) if plan.text is not None else None,
    )
