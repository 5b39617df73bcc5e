"""Every rule by the contract."""

from __future__ import annotations

import pytest

from tests.acceptance.contract import RuleContract
from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.exact import ExactMatch
from treespec_jax.acceptance.terminal import TerminalRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.acceptance.typical import TypicalRule


class TestExact(RuleContract):
    @pytest.fixture(scope="class")
    def rule(self):
        return ExactMatch()


class TestToken(RuleContract):
    @pytest.fixture(scope="class")
    def rule(self):
        return TokenRule()


class TestBlock(RuleContract):
    trees = ("chain:3",)

    @pytest.fixture(scope="class")
    def rule(self):
        return BlockRule()


class TestTraversal(RuleContract):
    @pytest.fixture(scope="class")
    def rule(self):
        return TraversalRule()


class TestTerminal(RuleContract):
    @pytest.fixture(scope="class")
    def rule(self):
        return TerminalRule()


class TestTypical(RuleContract):
    @pytest.fixture(scope="class")
    def rule(self):
        return TypicalRule()
