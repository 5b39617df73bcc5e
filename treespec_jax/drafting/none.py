"""No drafter: a tree of one node, which is plain decoding."""

from __future__ import annotations

import jax.numpy as jnp

from treespec_jax.trees import shapes
from treespec_jax.trees.token_tree import static_tree


class NoDrafter:
    """Proposes the root alone. See `protocol.Drafter`."""

    num_nodes = 1
    depth = 0
    shape = shapes.parse("none")
    draws = None
    module = None

    def with_module(self, module):
        return self

    def begin(self, batch, layout):
        return ()

    def prefill(self, state, slot, tokens_1T, start, count, page_table_1P):
        return state

    def insert(self, state, slot, root, length):
        return state

    def propose(self, state, context):
        tokens_BT = context.root[:, None]
        return static_tree(
            self.shape.topology, tokens_BT, jnp.zeros(tokens_BT.shape, jnp.float32)
        ), state

    def extend(self, state, emitted_BC, features, count_B):
        return state
