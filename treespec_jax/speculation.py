"""Speculation as one object: what drafts, in which shapes, and what decides.

`make` builds it from a `SpeculativeConfig`; it is all that the engine is told.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from flax import nnx

from treespec_jax import adaptive, limits
from treespec_jax.acceptance import compatibility, rules
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.acceptance.exact import ExactMatch
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.checks import from_mapping
from treespec_jax.config import DEFAULT_TAU, SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.drafting.none import NoDrafter
from treespec_jax.drafting.protocol import Drafter
from treespec_jax.models.transformer import Transformer
from treespec_jax.trees.shapes import ROOT_ONLY, Ladder, TreeShape


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a step speculates.

    Attributes:
      drafter: proposes trees.
      shapes: that it may be asked for; each is a program, compiled on first use. Of
        several the engine chooses before every dispatch (`engine.chooser`), so that
        they need the exact rule; the first is the one compiled first.
      rule: decides which drafted tokens are kept.
      proposal: how the drafter proposes nodes; "": as the rule usually has it.
      cascade: a lossy policy between drafter and target; None: the target's own.
      draft_temperature: of the drafter's own; None: that of the request.
      bound_by: names of the budgets of nodes that made the shapes smaller.

    Raises:
      UserError: a shape that the rule would not be lossless for.
    """

    drafter: Drafter
    shapes: tuple[TreeShape, ...]
    rule: Rule = ExactMatch()
    proposal: str = ""
    cascade: Cascade | None = None
    bound_by: tuple[str, ...] = ()
    draft_temperature: AdaptiveTemperature | None = None

    def __post_init__(self):
        cascade = self.cascade.name if self.cascade else ""
        chosen = {
            compatibility.choose_proposal(self.rule.name, self.proposal, s, cascade)
            for s in self.shapes
            if s.depth or cascade
        }
        # Of a root alone nothing is proposed, whatever the rule.
        proposal = chosen.pop() if chosen else "best"
        object.__setattr__(self, "proposal", proposal)

    @property
    def shape(self) -> TreeShape:
        """The only shape, or the first of several."""
        return self.shapes[0]

    @property
    def asks_costs(self) -> bool:
        """Whether it hangs on what steps cost."""
        priced = any(getattr(shape, "priced", False) for shape in self.shapes)
        return len(self.shapes) > 1 or priced

    @property
    def depth(self) -> int:
        """C, of the deepest shape."""
        return max(shape.depth for shape in self.shapes)

    def with_module(self, module: nnx.Module | None) -> Speculation:
        """The same, its drafter over other parameters."""
        drafter = self.drafter.with_module(module)
        return dataclasses.replace(self, drafter=drafter)


PLAIN = Speculation(NoDrafter(), (ROOT_ONLY,))


def find(config: SpeculativeConfig) -> tuple[type[Drafter], Any]:
    """The drafter's class, and its options.

    Raises:
      UserError: an option that it does not have.
    """
    config = limits.resolve(config)
    method = METHODS[config.method]
    module = importlib.import_module(f"treespec_jax.drafting.{method.module}")
    cls = getattr(module, method.name)
    name = f"options of method {config.method!r}"
    return cls, from_mapping(cls.Options, dict(config.options), name)


def make(
    config: SpeculativeConfig,
    model: Transformer | None = None,
    tau: float | None = None,
) -> Speculation:
    """Builds what `config` describes.

    Args:
      config: its `model` is not looked at.
      model: the drafter's, for methods that have one.
      tau: fitted for that model, where the configuration names none.

    Raises:
      UserError: names that are unknown or do not go together.
    """
    config = limits.resolve(config)
    shape = limits.check_speculation(config)
    if shape.depth == 0:
        return PLAIN
    cls, options = find(config)
    drafter = cls.make(model, config.tau or tau or DEFAULT_TAU, options)
    cascade = Cascade(config.cascade, float(config.alpha)) if config.cascade else None
    shapes = shape.shapes if isinstance(shape, Ladder) else (shape,)
    rule, bound_by = rules.make(config), limits.bound_by(config)
    return Speculation(
        drafter,
        shapes,
        rule,
        config.proposal,
        cascade,
        bound_by,
        adaptive.parse("adaptive_temperature", config.adaptive_temperature),
    )
