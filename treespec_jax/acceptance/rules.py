"""Rules by name."""

from __future__ import annotations

from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.exact import ExactMatch
from treespec_jax.acceptance.protocol import Rule
from treespec_jax.acceptance.terminal import TerminalRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.acceptance.typical import TypicalRule
from treespec_jax.config import SpeculativeConfig

_SIMPLE = {
    rule.name: rule
    for rule in (ExactMatch, TokenRule, BlockRule, TraversalRule, TerminalRule)
}


def make(spec: SpeculativeConfig) -> Rule:
    """The rule that `spec` names, which `compatibility` has checked."""
    if spec.rule == TypicalRule.name:
        return TypicalRule(spec.typical_eps, spec.typical_delta)
    return _SIMPLE[spec.rule]()
