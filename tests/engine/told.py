"""A chooser that does as it is told."""

from __future__ import annotations

from treespec_jax.engine.costs import Costs, Load, usual_curve
from treespec_jax.engine.timing import Choice
from treespec_jax.trees.shapes import ROOT_ONLY


class Told:
    """A chooser that is told what to do, and lists what it hears."""

    def __init__(self):
        self.choices, self.costs = [], Costs(usual_curve(True, True), 1)
        self.reset()

    def reset(self):
        self.tokens, self.heard = [], []

    def wanted(self, requests, ready):
        return None

    def priced(self, plan, shape):
        return plan

    def load(self, requests):
        return Load.of(len(requests), 0)

    def choose(self, max_steps, requests, ready, under_way):
        return self.choices[0] if self.choices else Choice(ROOT_ONLY, None)

    def started(self, choice, requests):
        self.choices = self.choices[1:]

    def record(self, choice, observed, steps, load, seconds):
        self.tokens += [tokens[:, -1].mean() for _, tokens in observed]

    def rehearsed(self, observed):
        self.heard += [tokens[-1] for _, tokens in observed]
