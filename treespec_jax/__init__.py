"""treespec-jax: tree-speculative inference in JAX.

Axis letters, used as suffixes of local names (`q_BTNH`):

B batch slots · T tree nodes, root included · U tree rows a node may see · S tokens of
prefix · N query heads · K key/value heads · G = N/K · H head width · D model width ·
F feed-forward width · V vocabulary · L layers · P pages · W frontier width of a
drafted level · C depth of a tree (levels below the root) · R = B·T rows of a product.
Activations are feature-major: `x_DR` is [features, rows].
"""
