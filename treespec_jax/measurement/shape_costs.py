"""Seconds of the parts of a step by the size of a tree, to price trees by."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM
from treespec_jax.measurement import step_cost
from treespec_jax.measurement.timing import in_turn
from treespec_jax.models.transformer import Transformer
from treespec_jax.trees.shapes import StaticShape
from treespec_jax.trees.topology import Topology, chain, regular
from treespec_jax.tuning.theory import Costs

# Measurements of each program.
ROUNDS = 7
# Nodes that a level of the drafter expands, whose cost is measured.
LEVELS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What costs are measured with.

    Attributes:
      plain: decodes without a drafter.
      drafting: the same target with a drafter. The rest of a step is measured on its
        tree, a static one of three levels or more.
      target: of both.
      prefix: token ids in front of what is timed.
      params: how to sample.
    """

    plain: LLM
    drafting: LLM
    target: Transformer
    prefix: Sequence[int]
    params: SamplingParams

    def measure(self, largest: int) -> Costs:
        """Costs of trees of up to `largest` nodes, the root included."""
        draft_root, levels = self._draft()
        return Costs(self._verify(largest), draft_root, levels, self._rest())

    def _verify(self, largest: int) -> tuple[tuple[int, float], ...]:
        sizes = [1]
        while sizes[-1] < largest:
            sizes.append(2 * sizes[-1])
        config = self.plain.engine.config
        programs = {
            str(size): step_cost.target_passes(
                self.target,
                StaticShape(chain(size - 1)),
                config,
                len(self.prefix),
                config.steps_per_dispatch,
            )
            for size in sizes
        }
        seconds = in_turn(programs, ROUNDS)
        return tuple((n, statistics.median(seconds[str(n)])) for n in sizes)

    def _draft(self) -> tuple[float, tuple[tuple[int, float], ...]]:
        """A chain of one node expands no level, each tree below two of one size."""
        trees = {n: regular((n, 1, 1)) for n in LEVELS}
        programs = {"root": self._phases(chain(1))}
        programs |= {str(n): self._phases(tree) for n, tree in trees.items()}
        seconds = {
            name: statistics.median(values)
            for name, values in in_turn(programs, ROUNDS).items()
        }
        root = seconds["root"]
        return root, tuple((n, max(0.0, seconds[str(n)] - root) / 2) for n in LEVELS)

    def _phases(self, topology: Topology):
        engine = self.drafting.engine
        speculation = dataclasses.replace(
            engine.speculation, shapes=(StaticShape(topology),)
        )
        config = engine.config
        steps, length = config.steps_per_dispatch, len(self.prefix)
        return step_cost.draft_phases(
            speculation, self.target, config, length, steps, self.params
        )

    def _rest(self) -> tuple[tuple[int, float], ...]:
        points = []
        for llm in (self.plain, self.drafting):
            cost = step_cost.step_cost(
                llm.engine, self.target, self.prefix, self.params, ROUNDS
            )
            rest = max(0.0, cost.step - cost.target - cost.draft)
            points.append((llm.engine.speculation.shape.num_nodes, rest))
        return tuple(points)
