"""Attention of a token tree over a paged prefix. See `api`."""

from pallas_kernels.tree_attention.api import tree_attention
from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes
from pallas_kernels.tree_attention.operands import Operands, page_shape
from pallas_kernels.tree_attention.quantized import (
    dequantize_rows,
    quantize_rows,
    rounded,
)
from pallas_kernels.tree_attention.sizes import BlockSizes
from pallas_kernels.tree_attention.spec import IMPLEMENTATIONS, AttentionSpec

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionSpec",
    "BlockSizes",
    "GpuBlockSizes",
    "Operands",
    "dequantize_rows",
    "page_shape",
    "quantize_rows",
    "rounded",
    "tree_attention",
]
