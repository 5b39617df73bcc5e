"""Ancestors from parents inside a jit, against climbing in Python."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.trees import shapes
from treespec_jax.trees.token_tree import ancestors_of, static_tree

B, T = 2, 7
ancestors = jax.jit(ancestors_of, static_argnums=1)
topological = st.tuples(st.just(0), *(st.integers(0, node - 1) for node in range(1, T)))


def climbed(parents, steps) -> np.ndarray:
    seen = np.zeros((len(parents), len(parents)), bool)
    for node in range(len(parents)):
        at = node
        for _ in range(steps + 1):
            seen[node, at] = True
            at = parents[at]
    return seen


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.tuples(topological, topological), st.sampled_from([1, 3, T]))
def test_ancestors_equal_climbing(parents, steps):
    """Any topological order, a tree per slot; the walk is `depth` steps long."""
    got = np.asarray(ancestors(jnp.asarray(parents, jnp.int32), steps))
    for b in range(B):
        np.testing.assert_array_equal(got[b], climbed(parents[b], steps))


def test_static_tree_repeats_its_topology_per_slot():
    topology = shapes.parse("regular:2x2").topology
    tokens = jnp.arange(2 * 7, dtype=jnp.int32).reshape(2, 7)
    logprob = jnp.zeros((2, 7)).at[1, 4].set(-jnp.inf)
    tree = static_tree(topology, tokens, logprob)
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 2
    for b in range(2):
        np.testing.assert_array_equal(tree.ancestors[b], topology.ancestors)
        np.testing.assert_array_equal(tree.depth[b], topology.depths)
    assert np.argwhere(~np.asarray(tree.valid)).tolist() == [[1, 4]]


def test_token_tree_is_a_pytree_of_its_arrays():
    tree = static_tree(
        shapes.parse("chain:2").topology,
        jnp.zeros((1, 3), jnp.int32),
        jnp.zeros((1, 3)),
    )
    assert len(jax.tree.leaves(tree)) == 6
    same = jax.jit(functools.partial(jax.tree.map, jnp.asarray))(tree)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
