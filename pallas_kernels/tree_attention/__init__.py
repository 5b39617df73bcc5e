"""Attention of a token tree over a paged prefix. See `api`."""

from pallas_kernels.tree_attention.api import IMPLEMENTATIONS, tree_attention
from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes
from pallas_kernels.tree_attention.quantized import dequantize_rows, quantize_rows
from pallas_kernels.tree_attention.sizes import BlockSizes

__all__ = [
    "IMPLEMENTATIONS",
    "BlockSizes",
    "GpuBlockSizes",
    "dequantize_rows",
    "quantize_rows",
    "tree_attention",
]
