"""Key-value caches, one per layer: growing, sliding, quantized, and for batches of rows of different lengths.

Class names, methods and `state` are those of mlx-lm: its generators can use our caches, our models can use its caches,
and both read the same prompt cache files. Keys and values are [B, K, T, D] (rows, key-value heads, positions,
head_dim). Buffers grow in steps, so they are longer than their content.
"""

from .base import Cache, causal_mask
from .growing import BatchKVCache, KVCache, QuantizedKVCache, check_window, make_cache
from .rotating import BatchRotatingKVCache, RotatingKVCache
from .rows import RowCaches, rewind, step_caches

__all__ = [
    "BatchKVCache",
    "BatchRotatingKVCache",
    "Cache",
    "KVCache",
    "QuantizedKVCache",
    "RotatingKVCache",
    "RowCaches",
    "causal_mask",
    "check_window",
    "make_cache",
    "rewind",
    "step_caches",
]
