"""treespec-jax: tree-speculative inference in JAX.

Axis letters, used as suffixes of local names (`q_BTNH`):

B batch slots · T tree nodes, root included · U tree rows a node may see · S tokens of
prefix · N query heads · K key/value heads · G = N/K · H head width · D model width ·
F feed-forward width · V vocabulary · L layers · P pages · W frontier width of a
drafted level · C depth of a tree (levels below the root) · R = B·T rows of a product.
Activations are feature-major: `x_DR` is [features, rows].
"""

from __future__ import annotations

import importlib

_PUBLIC = {
    "LLM": "treespec_jax.llm",
    "SamplingParams": "treespec_jax.config",
    "UserError": "treespec_jax.errors",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Loads public names on first use: scripts check their flags before jax starts."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
