"""The jitted functions of a drafter's training, over one target and one drafter."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from treespec_jax.checkpoints import LoadedModel
from treespec_jax.checkpoints.loading import check_floats
from treespec_jax.models.flat import FlatModule
from treespec_jax.training import head_losses
from treespec_jax.training.answers import MaskedRows
from treespec_jax.training.drafter_settings import DrafterTraining
from treespec_jax.training.state import TrainState, make_optimizer
from treespec_jax.training.students import STUDENTS, Taught

# Shapes whose tokens per step are told while a run goes on: children by depth.
SHAPES = {
    "chain:3": (1, 1, 1),
    "chain:5": (1, 1, 1, 1, 1),
    "regular:3x2x1": (3, 2, 1),
    "regular:4x2x2x1x1": (4, 2, 2, 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of held-out text.

    Attributes:
      loss: the objective, nats per prediction.
      tokens_per_step: by shape; of decoding that meets every position alike, where the
        text is the target's own.
    """

    loss: float
    tokens_per_step: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Split:
    """A drafter's leaves: those that are trained, and those that stay.

    Attributes:
      flat: the drafter.
      trained: bool per leaf of `flat`.
    """

    flat: FlatModule
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, drafter: nnx.Module, shared: set[str]) -> Split:
        """All parameters are trained but those of the names in `shared`."""
        trained = tuple(
            isinstance(leaf, nnx.Param) and str(path[0]) not in shared
            for path, leaf in nnx.to_flat_state(nnx.state(drafter))
        )
        return cls(FlatModule(drafter), trained)

    def leaves(self, trained: bool) -> tuple[jax.Array, ...]:
        """Those that are trained, or those that stay."""
        pairs = zip(self.flat.leaves, self.trained, strict=True)
        return tuple(leaf for leaf, is_trained in pairs if is_trained == trained)

    def bind(self, trained: Any, fixed: Any) -> nnx.Module:
        """The drafter with these leaves."""
        trained, fixed = iter(trained), iter(fixed)
        return self.flat.bind(
            tuple(next(trained if t else fixed) for t in self.trained)
        )


class Trainer:
    """See the module's text.

    Args:
      config: of the run.
      target: its weights in the dtype of the computation.
      rows: to train on; the drafter's tokens are chosen from them.

    Attributes:
      config: of the run.
      student: of the run's method.
      split: the drafter.
    """

    def __init__(self, config: DrafterTraining, target: LoadedModel, rows: MaskedRows):
        check_floats(target)
        self.config = config
        self.student = STUDENTS[config.method]
        drafter = self.student.make(config, target.model, rows)
        shared = self.student.shared(drafter)
        self.split = Split.of(drafter, shared)
        # Beside the trained leaves, a prediction reads a head that is the target's.
        self._read_too = drafter.head[...].size if "head" in shared else 0
        self._target = FlatModule(target.model)
        # The rate is an argument: a schedule that is cut short compiles nothing.
        self._optimizer = make_optimizer(config.optimizer, 1.0)
        self._dtype = target.dtype
        devices = np.asarray(jax.devices())
        self._mesh = None
        if len(devices) > 1 and config.data.micro_rows % len(devices) == 0:
            self._mesh = jax.sharding.Mesh(devices, ("data",))
        self._fixed = self._everywhere(self.split.leaves(trained=False))
        self._target_leaves = self._everywhere(self._target.leaves)
        self._step = jax.jit(self._advance, donate_argnums=0)
        self._measure = jax.jit(self._measured)

    @property
    def parameters(self) -> int:
        """Number that is trained."""
        return sum(leaf.size for leaf in self.split.leaves(trained=True))

    @property
    def target_parameters(self) -> int:
        """Number of the target."""
        return sum(leaf.size for leaf in self._target.leaves)

    @property
    def flops_per_token(self) -> float:
        """Of a training step, as a rule of thumb: 2 a parameter of the target, 6 a
        parameter that a prediction reads."""
        count = 1 if self.student.chained else self.config.objective.predictions
        read = self.parameters + self._read_too
        return 2.0 * self.target_parameters + 6.0 * read * count

    def init(self) -> TrainState:
        """Before the first step."""
        # Copies: the state is donated, the drafter stays.
        leaves = tuple(
            jnp.array(leaf, jnp.float32) for leaf in self.split.leaves(trained=True)
        )
        start = jnp.zeros((), jnp.int32)
        state = TrainState(leaves, self._optimizer.init(leaves), start)
        return self._everywhere(state)

    def step(
        self, state: TrainState, rows: MaskedRows, rate: float
    ) -> tuple[TrainState, jax.Array]:
        """One optimiser step over rows [batch_rows, T + 1]; the loss before it."""
        shape = -1, self.config.data.micro_rows, rows.tokens.shape[1]
        batch = rows.tokens.reshape(shape), rows.written.reshape(shape)
        batch = self._cut(batch)
        rate = np.float32(rate)
        return self._step(state, self._fixed, self._target_leaves, rate, *batch)

    def measure(self, leaves: Any, rows: MaskedRows) -> Measured:
        """Of whole runs of micro_rows rows, with these trained leaves."""
        width = min(self.config.data.micro_rows, len(rows.tokens))
        sums = collections.Counter()
        for first in range(0, len(rows.tokens) - width + 1, width):
            part = slice(first, first + width)
            found = self._measure(
                leaves,
                self._fixed,
                self._target_leaves,
                rows.tokens[part],
                rows.written[part],
            )
            sums.update({name: float(value) for name, value in found.items()})
        per_step = {
            name: 1 + sums[name] / max(sums["positions"], 1)
            for name in SHAPES
            if name in sums
        }
        return Measured(sums["loss"] / sums["runs"], per_step)

    def trained(self, leaves: Any) -> nnx.Module:
        """The drafter with these trained leaves."""
        return self.split.bind(leaves, self.split.leaves(trained=False))

    def _advance(self, state, fixed, target_leaves, rate, tokens_AMU, counts_AMU):
        def loss_of(leaves, taught):
            return self._loss(self._bound(leaves, fixed), taught)

        def accumulate(carry, part):
            taught = self._taught(fixed, target_leaves, state.leaves, *part)
            found = jax.value_and_grad(loss_of)(state.leaves, taught)
            return jax.tree.map(jnp.add, carry, found), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.leaves)
        sums, _ = jax.lax.scan(accumulate, zero, (tokens_AMU, counts_AMU))
        loss, grads = jax.tree.map(lambda total: total / len(tokens_AMU), sums)
        updates, inner = self._optimizer.update(grads, state.optimizer, state.leaves)
        updates = jax.tree.map(lambda update: rate * update, updates)
        leaves = optax.apply_updates(state.leaves, updates)
        return TrainState(leaves, inner, state.step + 1), loss

    def _measured(self, leaves, fixed, target_leaves, tokens_BU, counts_BU):
        taught = self._taught(fixed, target_leaves, leaves, tokens_BU, counts_BU)
        drafter, count = self._bound(leaves, fixed), self.config.objective.predictions
        rank_SBT, valid_SBT = head_losses.ranks(self.student, drafter, taught, count)
        valid_BT = valid_SBT[-1]
        out = {"loss": self._loss(drafter, taught), "runs": 1.0}
        out["positions"] = jnp.sum(valid_BT)
        for name, widths in SHAPES.items():
            if len(widths) > count:
                continue
            limit = jnp.asarray(widths)[:, None, None]
            right_SBT = jnp.cumprod(rank_SBT[: len(widths)] < limit, axis=0)
            out[name] = jnp.sum(jnp.sum(right_SBT, axis=0) * valid_BT)
        return out

    def _loss(self, drafter, taught):
        return head_losses.loss(self.student, drafter, taught, self.config.objective)

    def _taught(self, fixed, target_leaves, leaves, tokens, counts) -> Taught:
        target = self._target.bind(target_leaves)
        drafter = self._bound(leaves, fixed)
        taught = head_losses.teach(self.student, drafter, target, tokens, counts)
        return jax.lax.stop_gradient(taught)

    def _bound(self, leaves, fixed):
        leaves = tuple(leaf.astype(self._dtype) for leaf in leaves)
        return self.split.bind(leaves, fixed)

    def _everywhere(self, tree):
        if self._mesh is None:
            return tree
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.device_put(tree, whole)

    def _cut(self, batch):
        if self._mesh is None:
            return batch
        spec = jax.sharding.PartitionSpec(None, "data")
        return jax.device_put(batch, jax.sharding.NamedSharding(self._mesh, spec))
