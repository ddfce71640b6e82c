"""Attention of one new token a row against caches, on each device of a mesh for its own rows and heads.

Nothing crosses between devices. Rows, and the prompts that they share, are cut over data, fsdp and expert; heads over tensor
where it divides the query heads and either it divides the key heads too, and so the caches, or they divide it: then every
device has the whole caches of its rows, and reads the one key head that its query heads share. Otherwise heads stay whole.
"""

import functools

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from kernels import dispatch
from kernels.decode_attention import decode_attention, write_cache
from rl_reason.sharding import ROWS, heads_axis, num_row_shards


def attend_cached(
    q: Float[Array, "M H hd"],
    k: Float[Array, "M KV hd"],
    v: Float[Array, "M KV hd"],
    cache: PyTree,
    prompt_cache: PyTree,
    count: Int[Array, " M"],
    prompt_lens: Int[Array, " B"],
    prompt_index: Int[Array, " M"],
    layer: Int[Array, ""] | None,
    *,
    num_shards: int,
    window: int | Int[Array, ""] | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "M H hd"], PyTree]:
    """Writes k and v at ``count`` into the caches (keys and values, each [(L) M S KV hd]) and attends to all up to there.

    ``prompt_index`` counts within each of ``num_shards`` equal blocks of rows and prompts, as in ``decode_attention``.
    Returns the context and the new cache.
    """
    operands = q, k, v, cache, prompt_cache, count, prompt_lens, prompt_index, layer, window
    run = functools.partial(_attend, scale=scale, soft_cap=soft_cap)
    mesh = jax.sharding.get_abstract_mesh()
    if dispatch.on_one_device() or num_row_shards(mesh) != num_shards:
        return run(*operands, num_shards=num_shards)
    heads, kv_heads = q.shape[1], k.shape[1]
    ways = mesh.shape["tensor"]
    share = heads % ways == 0 and ways % kv_heads == 0  # several devices read the same key head
    cut_kv = heads_axis(kv_heads)
    queries = P(ROWS, "tensor" if share else cut_kv)
    new, stack = P(ROWS, cut_kv), () if layer is None else (None,)
    caches, rows = P(*stack, ROWS, None, cut_kv), P(ROWS)
    own = functools.partial(run, num_shards=1, devices_a_head=ways // kv_heads if share and not cut_kv else 0)
    specs = queries, new, new, caches, caches, rows, rows, rows, P(), P()
    return jax.shard_map(own, in_specs=specs, out_specs=(queries, caches), check_vma=False)(*operands)


def _attend(
    q,
    k,
    v,
    cache,
    prompt_cache,
    count,
    prompt_lens,
    prompt_index,
    layer,
    window,
    *,
    num_shards,
    devices_a_head=0,
    **how,
):
    cache = tuple(write_cache(old, new, count, layer=layer) for old, new in zip(cache, (k, v), strict=True))

    def read(x):
        if not devices_a_head:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") // devices_a_head, 1, axis=-2)

    keys, values, prompt_keys, prompt_values = map(read, (*cache, *prompt_cache))
    out = decode_attention(
        q,
        keys,
        values,
        lengths=count + 1,
        prompt_keys=prompt_keys,
        prompt_values=prompt_values,
        prompt_lens=prompt_lens,
        prompt_index=prompt_index,
        num_shards=num_shards,
        layer=layer,
        window=window,
        **how,
    )
    return out, cache
