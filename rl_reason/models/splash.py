"""Causal attention on TPUs by jax's own splash attention kernel: no score ever leaves the chip's fast memory.

The kernel knows nothing of meshes, so where one of several devices is in use it runs inside ``shard_map``: rows over data,
fsdp and expert, heads over tensor as far as they divide.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rl_reason.sharding import ROWS, num_row_shards

LANES = 128  # heads and blocks are multiples of it
BLOCK = 512  # queries, and keys, that are in fast memory at a time
SHORTEST = 256  # shorter rows are left to XLA


def unfit(width: int, head_dim: int) -> bool:
    """Whether rows are too short to gain from it, or heads of a size that it does not take."""
    return width < SHORTEST or head_dim % LANES != 0


def attention(
    q: Float[Array, "N T H hd"],
    k: Float[Array, "N T KV hd"],
    v: Float[Array, "N T KV hd"],
    segments: Int[Array, "N T"] | None,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> Float[Array, "N T H hd"]:
    """``attention.causal_attention`` of rows that are not ``unfit``, on the devices of the mesh in use."""
    own = functools.partial(_on_one_device, scale=scale, soft_cap=soft_cap, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return own(q, k, v, segments)
    rows = ROWS if q.shape[0] % num_row_shards(mesh) == 0 else None
    ways = mesh.shape["tensor"]
    if q.shape[2] % ways:
        ways = 1
    if repeats := (ways // math.gcd(ways, k.shape[2])) - 1:  # a key head for every device, the same on several
        k, v = (jnp.repeat(x, repeats + 1, axis=2) for x in (k, v))
    heads, row = P(rows, None, "tensor" if ways > 1 else None, None), P(rows, None)
    if segments is None:
        cut = jax.shard_map(
            lambda q, k, v: own(q, k, v, None), in_specs=(heads,) * 3, out_specs=heads, check_vma=False
        )
        return cut(q, k, v)
    return jax.shard_map(own, in_specs=(heads, heads, heads, row), out_specs=heads, check_vma=False)(q, k, v, segments)


def _on_one_device(q, k, v, segments, *, scale, soft_cap, window):
    rows, width, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    block = min(BLOCK, LANES * math.ceil(width / LANES))
    padded = block * math.ceil(width / block)  # columns past the row's end come after every query that counts
    fill = lambda x: jnp.pad(x, ((0, 0), (0, padded - width), *((0, 0),) * (x.ndim - 2)))
    q = fill((q * scale).astype(q.dtype)).reshape(rows, padded, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (fill(x).transpose(0, 2, 1, 3) for x in (k, v))
    kernel = _kernel(padded, groups, block, soft_cap, window)
    ids = None if segments is None else splash.SegmentIds(fill(segments), fill(segments))
    out: typing.Any = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))(q, k, v, ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, padded, heads, head_dim)[:, :width]


def _kernel(width: int, heads: int, block: int, soft_cap: float | None, window: int | None):
    shape = (width, width)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,  # a kernel of its own: the fused one keeps a gradient of q for each block of keys
        block_kv_dq=block,
    )
    return splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, attn_logits_soft_cap=soft_cap
    )
