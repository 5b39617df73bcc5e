"""Attention of a token tree over a paged prefix. See `api`."""

from pallas_kernels.tree_attention.api import tree_attention

__all__ = ["tree_attention"]
