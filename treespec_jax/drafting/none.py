"""No drafter: a tree of one node, which is plain decoding."""

from __future__ import annotations

import jax.numpy as jnp

from treespec_jax.drafting.protocol import Needs, NoOptions
from treespec_jax.trees.shapes import ROOT_ONLY
from treespec_jax.trees.token_tree import static_tree


class NoDrafter:
    """Proposes the root alone. See `protocol.Drafter`."""

    module = None
    needs = Needs()
    sources = ()
    tau = 1.0
    Options = NoOptions

    @classmethod
    def make(cls, model, tau, options):
        return cls()

    def with_module(self, module):
        return self

    def init(self, sizes):
        return ()

    def ingest(self, state, committed):
        return state

    def copy_slot(self, state, source, destination):
        return state

    def copy_pages(self, state, copies):
        return state

    def resume(self, state, committed):
        return state

    def propose(self, state, shape, context):
        if shape != ROOT_ONLY:
            raise ValueError(f"no drafter can propose {shape}")
        tokens_BT = context.root[:, None]
        estimate_BT = jnp.zeros(tokens_BT.shape, jnp.float32)
        return static_tree(shape.topology, tokens_BT, estimate_BT), state
