"""Attention of one new token a row against key-value caches, and the write into them."""

from kernels.decode_attention.cache import write_cache
from kernels.decode_attention.public import decode_attention

__all__ = ["decode_attention", "write_cache"]
