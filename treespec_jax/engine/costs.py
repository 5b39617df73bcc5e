"""What a step of each shape costs, relative to a plain step; free of jax.

Three sources, the best one first: times of neighbouring dispatches, of this engine
(`Costs.compare`) and of earlier runs; the curve of `treespec measure_costs` (`Known`);
and a rough curve of the kind of device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.trees import shapes as naming
from treespec_jax.trees.shapes import ROOT_ONLY, TreeShape

# The program of plain steps before which a tree is grown that nobody verifies.
REHEARSAL = "rehearsal"
# What every dispatch takes besides its steps, and what the first plain one behind one
# of trees does.
HOST, SWITCH = "host", "switch"
# The programs that take in what waits for a drafter's model, and a chunk of a prompt.
CATCH_UP, PREFILL = "catch up", "prefill"
# Comparisons of times whose median counts; and of rehearsals, whose times are small
# differences, beside as many guesses as of the others.
COMPARISONS, MANY = 5, 31
# Tokens of context from which on costs are learnt apart; again at every doubling.
CONTEXT = 1024


@dataclasses.dataclass(frozen=True, order=True)
class Load:
    """What a step's cost depends on besides its shape, in classes.

    Attributes:
      slots: class of the number of texts, its binary length.
      context: class of the longest text, 0 below CONTEXT tokens.
    """

    slots: int
    context: int

    @classmethod
    def of(cls, slots: int, context: int) -> Load:
        """Of so many texts, the longest of so many tokens."""
        return cls(max(slots, 1).bit_length(), context_class(context))


def context_class(context: int) -> int:
    """Of a text of so many tokens: 0 below CONTEXT, 1 below twice that, …"""
    return (context // CONTEXT).bit_length()


@dataclasses.dataclass(frozen=True)
class CostCurve:
    """Seconds, or any other unit, of the parts of a step.

    For example `CostCurve(((1, 2.0), (16, 3.0)), 0.1, 0.2, 0.1)`: a plain step takes
    2.1, and one with a chain of three nodes 2.8.

    Attributes:
      verify: (rows, seconds) of the target's pass, ascending in rows, which are slots
        times nodes; linear between and beyond.
      root: of a drafter's part that needs no level.
      level: of a level of the drafter.
      rest: of deciding, committing and the host.
    """

    verify: tuple[tuple[float, float], ...]
    root: float
    level: float
    rest: float

    def step(self, shape: TreeShape, slots: int) -> float:
        """Of a step; slots without a text have their rows, too."""
        return self._verify(slots * shape.num_nodes) + self.draft(shape) + self.rest

    def draft(self, shape: TreeShape) -> float:
        """Of growing a tree."""
        return self.root + self.level * (shape.depth - 1) if shape.depth else 0.0

    def relative(self, shape: TreeShape, slots: int) -> float:
        """Of a step, in plain steps."""
        return self.step(shape, slots) / self.step(ROOT_ONLY, slots)

    def level_price(self, shape: TreeShape, slots: int, tokens: float) -> float:
        """Tokens that are emitted in the time of a level of the drafter.

        Args:
          shape: of the tree.
          slots: B.
          tokens: of a step. It is taken to run a level for each but the first two: the
            root has the first one's, the target adds the last.
        """
        levels = min(max(tokens - 2.0, 0.0), max(shape.depth - 1, 0))
        time = self.root + self._verify(slots * shape.num_nodes) + self.rest
        time += levels * self.level
        return tokens * self.level / time if time > 0 else 0.0

    def _verify(self, rows: int) -> float:
        sizes, seconds = np.array(self.verify, float).T
        if rows <= sizes[-1] or len(sizes) == 1:
            return float(np.interp(rows, sizes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return float(seconds[-1] + max(0.0, slope) * (rows - sizes[-1]))


def usual_curve(cpu: bool, with_model: bool) -> CostCurve:
    """A rough curve, in passes of one row, for what was never measured.

    On a CPU the products soon take more time than reading the weights; on an
    accelerator a few hundred rows are as quick as one.

    Args:
      cpu: the device is one.
      with_model: the drafter runs passes of a model.
    """
    level = (0.1 if cpu else 0.05) if with_model else 0.015
    if cpu:
        return CostCurve(((1, 1.0), (64, 6.0)), level, level, 0.05)
    return CostCurve(((1, 1.0), (32, 1.13), (256, 2.0)), level, level, 0.1)


@dataclasses.dataclass(frozen=True)
class Known:
    """What earlier runs found out.

    Attributes:
      curves: by class of context, see `context_class`.
      steps: costs of a step in plain steps, by load and name of the shape, and of a
        rehearsal.
    """

    curves: Mapping[int, CostCurve] = dataclasses.field(default_factory=dict)
    steps: Mapping[tuple[Load, str], Sequence[float]] = dataclasses.field(
        default_factory=dict
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which `from_dict` reads."""
        return {
            "curves": {str(n): dataclasses.asdict(c) for n, c in self.curves.items()},
            "steps": [
                {"slots": load.slots, "context": load.context, "shape": name}
                | {"costs": [round(cost, 4) for cost in costs]}
                for (load, name), costs in sorted(self.steps.items())
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Known:
        """Raises KeyError, TypeError or ValueError for what `as_dict` never wrote."""
        curves = {
            int(context): CostCurve(
                tuple((float(n), float(s)) for n, s in curve["verify"]),
                *(float(curve[name]) for name in ("root", "level", "rest")),
            )
            for context, curve in values["curves"].items()
        }
        steps = {
            (Load(int(e["slots"]), int(e["context"])), str(e["shape"])): [
                float(cost) for cost in e["costs"]
            ]
            for e in values["steps"]
        }
        return cls(curves, steps)


class Costs:
    """Costs of steps in plain steps.

    Args:
      usual: what to go by where nothing was measured.
      slots: B of the engine.
      known: of earlier runs.
      keep: is given what is known by now, a few times in a run; None: nobody keeps it.
    """

    def __init__(
        self,
        usual: CostCurve,
        slots: int,
        known: Known | None = None,
        keep: Callable[[Known], None] | None = None,
    ):
        known = known or Known()
        self._usual, self._slots = usual, slots
        self._curves, self._keep = dict(known.curves), keep
        self._compared: dict[tuple[Load, str], collections.deque[float]] = {}
        for key, costs in known.steps.items():
            self._compared[key] = collections.deque(costs, _kept(key[1]))
        self._fresh: collections.Counter[tuple[Load, str]] = collections.Counter()
        # They are asked for before every dispatch, and change with a comparison alone.
        self.relative = functools.cache(self._relative)
        self.rehearsal = functools.cache(self._rehearsal)

    def _relative(self, shape: TreeShape, load: Load) -> float:
        """Of a step of that shape, in plain steps."""
        if not shape.depth:
            return 1.0
        name = naming.text_of(shape)
        guess = self._guess(shape, load)
        if self._compared.get((load, name)):
            return self._measured(load, name, guess)
        # Another load tells how far the curve is off.
        other = self._nearest(name, load)
        if other is None:
            return 1.0 + self._stretch(shape, load) * (guess - 1.0)
        guess_there = self._guess(shape, other)
        return guess * self._measured(other, name, guess_there) / guess_there

    def _stretch(self, shape: TreeShape, load: Load) -> float:
        """By how much more than the guess the tree of the next size costs, if it does.

        Both beyond a plain step; 1 if none has comparisons enough under that load.
        """
        known = [
            naming.parse(name)
            for (other, name), costs in self._compared.items()
            if other == load and ":" in name and len(costs) >= COMPARISONS
        ]
        if not known:
            return 1.0
        tree = min(known, key=lambda tree: abs(tree.num_nodes - shape.num_nodes))
        measured = statistics.median(self._compared[load, naming.text_of(tree)])
        return max(1.0, (measured - 1.0) / max(self._guess(tree, load) - 1.0, 0.01))

    def _nearest(self, name: str, load: Load) -> Load | None:
        """The load like this one that has comparisons of the name; None if none has."""
        near = [
            (abs(other.slots - load.slots), abs(other.context - load.context), other)
            for (other, known), costs in self._compared.items()
            if known == name and costs
        ]
        return min(near)[2] if near else None

    def level_price(self, shape: TreeShape, load: Load, tokens: float) -> float:
        """See `CostCurve.level_price`; by the curve of the nearest context."""
        return self._curve(load).level_price(shape, self._slots, tokens)

    def _measured(self, load: Load, name: str, guess: float) -> float:
        """The median of the comparisons; while there are few, the guess is another."""
        compared = self._compared[load, name]
        few = len(compared) < COMPARISONS
        return float(statistics.median([*compared, guess] if few else compared))

    def _rehearsal(self, shape: TreeShape, load: Load) -> float:
        """Of growing a tree of that shape beside a step, in plain steps."""
        curve = self._curve(load)
        guess = curve.draft(shape) / curve.step(ROOT_ONLY, self._slots)
        # Whoever decodes, the drafter's passes are of all slots.
        nearest = self._nearest(REHEARSAL, load)
        compared = self._compared[nearest, REHEARSAL] if nearest else ()
        # Some take in what waits and some do not, so that a mean is the price; of the
        # middle half, since a process's first ones take many times as long.
        guesses = [guess] * max(0, COMPARISONS - len(compared))
        costs = sorted([*guesses, *compared])
        odd = len(costs) // 4
        return max(0.0, statistics.mean(costs[odd : len(costs) - odd]))

    def is_doubtful(self, shape: TreeShape, load: Load) -> bool:
        """Whether an only comparison says what a step costs, and the guess says less.

        Whatever else the machine did may have made that any factor larger.
        """
        compared = self._compared.get((load, naming.text_of(shape)), ())
        return len(compared) == 1 and compared[0] > self._guess(shape, load)

    def least(self, shape: TreeShape, load: Load) -> float:
        """Of a step in plain steps, as far as it may be less than it looks."""
        doubtful = self.is_doubtful(shape, load)
        return self._guess(shape, load) if doubtful else self.relative(shape, load)

    def host(self, load: Load) -> float:
        """Of a dispatch besides its steps, in plain steps."""
        compared = self._compared.get((load, HOST), ())
        zeros = [0.0] * max(0, COMPARISONS - len(compared))
        return max(0.0, statistics.median([*zeros, *compared]))

    def switch(self, load: Load) -> float | None:
        """Of the first plain dispatch behind one of trees, besides, in plain steps.

        None: nothing tells.
        """
        compared = self._compared.get((load, SWITCH))
        return statistics.median(compared) if compared else None

    def is_known(self, name: str, load: Load) -> bool:
        """Whether HOST or SWITCH goes by comparisons, of this or of earlier runs."""
        return self.count(name, load) >= COMPARISONS

    def count(self, shape: TreeShape | str, load: Load) -> int:
        """Comparisons that tell of it, of this and of earlier runs."""
        name = shape if isinstance(shape, str) else naming.text_of(shape)
        return len(self._compared.get((load, name), ()))

    def has_comparisons(self, shape: TreeShape, load: Load) -> bool:
        """Whether comparisons of such a step, of this or of earlier runs, go by all.

        Those of other numbers of texts do, too.
        """
        nearest = self._nearest(naming.text_of(shape), load)
        if nearest is None or nearest.context != load.context:
            return False
        return len(self._compared[nearest, naming.text_of(shape)]) >= COMPARISONS

    def is_measured(self, shape: TreeShape, load: Load, times: int = 1) -> bool:
        """Whether this engine compared such a step with another one, so many times."""
        return self._fresh[load, naming.text_of(shape)] >= times

    def compare(self, shape: TreeShape | str, load: Load, cost: float) -> None:
        """Takes in what a step of a shape, or what is named, cost in plain steps."""
        key = load, shape if isinstance(shape, str) else naming.text_of(shape)
        self._compared.setdefault(key, collections.deque(maxlen=_kept(key[1])))
        self._compared[key].append(cost)
        self._fresh[key] += 1
        self.relative.cache_clear()
        self.rehearsal.cache_clear()
        # Rarely, since it writes a file: after 4, 8, 16, … comparisons.
        count = sum(self._fresh.values())
        if self._keep and count >= 4 and count.bit_count() == 1:
            self._keep(self.known)

    def keep(self) -> None:
        """Has all that is known kept at once."""
        if self._keep:
            self._keep(self.known)

    @property
    def known(self) -> Known:
        """All that is known by now."""
        return Known(
            dict(self._curves), {key: list(c) for key, c in self._compared.items()}
        )

    def _guess(self, shape: TreeShape, load: Load) -> float:
        return self._curve(load).relative(shape, self._slots)

    def _curve(self, load: Load) -> CostCurve:
        """Of the nearest context."""
        curves = self._curves or {0: self._usual}
        nearest = min(curves, key=lambda context: abs(context - load.context))
        return curves[nearest]


def _kept(name: str) -> int:
    """Comparisons that count: more of what is a small difference of times."""
    return MANY if name in (REHEARSAL, HOST, SWITCH) else COMPARISONS
