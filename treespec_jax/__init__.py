"""treespec-jax: tree-speculative inference in JAX.

Axis letters, used as suffixes of local names (`q_BTNH`), each with one meaning:

B batch slots · T tree nodes, root included, or other new rows of a pass · U tree rows
that a node may see · S tokens of a text or prefix · N query heads · K key/value heads ·
G = N/K · H head width · D model width · F feed-forward width · V vocabulary ·
L layers · P pages · W frontier width of a drafted level · X children of a node ·
E nodes that were expanded · C levels of a tree below the root (arrays of a path have
C + 1 entries) · R rows of a product: B·T, B·W, in attention T·G · I, J entries of some
list. A digit is a size.
Activations are feature-major: `x_DR` is [features, rows].
"""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Branch": "treespec_jax.branch",
    "LLM": "treespec_jax.llm",
    "SamplingParams": "treespec_jax.config",
    "UserError": "treespec_jax.errors",
    "explore": "treespec_jax.exploration",
    "train_eagle": "treespec_jax.training.functions",
    "train_medusa_heads": "treespec_jax.training.functions",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Loads public names on first use: scripts check their flags before jax starts."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
