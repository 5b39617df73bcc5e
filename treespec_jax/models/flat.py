"""A module as a flat tuple of leaves and a static rest.

Parameters cross the jit boundary as flat leaves with the graph definition closed over:
the host's cost per call is then that of the leaves alone.
"""

from __future__ import annotations

import jax
from flax import nnx


class FlatModule:
    """A module split for a jitted function.

    Args:
      module: an NNX module, its parameters shared, not copied; None has no leaves.

    Attributes:
      leaves: tuple of arrays, to pass through the jit boundary.
    """

    def __init__(self, module: nnx.Module | None):
        self._graph, state = nnx.split(module) if module is not None else (None, ())
        leaves, self._structure = jax.tree.flatten(state)
        self.leaves = tuple(leaves)

    def bind(self, leaves: tuple[jax.Array, ...]) -> nnx.Module | None:
        """The module with these leaves in place of its own."""
        if self._graph is None:
            return None
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
