"""The meaning, in plain XLA: every position of the cache is scored and what lies past a row's length masked."""

import jax
import jax.numpy as jnp


def decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    prompt: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None,
    layer: jax.Array | None,
    num_shards: int,
    soft_cap: float | None,
    window: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """[B, H, hd] in the queries' dtype; arguments as in the public function, validated there; prompt is
    (keys, values, lens, index)."""
    num_rows, num_heads, head_dim = queries.shape
    num_kv = keys.shape[-2]
    accumulate = jnp.promote_types(queries.dtype, jnp.float32)
    q = queries.reshape(num_rows, num_kv, num_heads // num_kv, head_dim)
    score = lambda k: _scores(q, k, scale, soft_cap, accumulate)

    keys, values = _layer(keys, layer), _layer(values, layer)
    parts = [(score(keys), values, _visible(keys.shape[1], lengths, lengths, window))]
    if prompt is not None:
        prompt_keys, prompt_values, lens, index = prompt
        take = lambda x: _take_rows(x, index, num_shards)
        own_keys, own_values, lens = take(_layer(prompt_keys, layer)), take(_layer(prompt_values, layer)), take(lens)
        mask = _visible(own_keys.shape[1], lens, lens + lengths, window)
        parts.append((score(own_keys), own_values, mask & (lengths > 0)[:, None]))
    return _softmax_average(parts, accumulate).reshape(queries.shape).astype(queries.dtype)


def _layer(cache: jax.Array, layer: jax.Array | None) -> jax.Array:
    return cache if layer is None else jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False)


def _take_rows(x: jax.Array, index: jax.Array, num_shards: int) -> jax.Array:
    """x[index] within each of num_shards equal blocks; a batched gather, which stays local to a shard under GSPMD."""
    blocks = x.reshape(num_shards, x.shape[0] // num_shards, *x.shape[1:])
    taken = jax.vmap(lambda block, i: block.at[i].get(mode="clip"))(blocks, index.reshape(num_shards, -1))
    return taken.reshape(index.shape[0], *x.shape[1:])


def _visible(size: int, lengths: jax.Array, total: jax.Array, window: jax.Array | None) -> jax.Array:
    """Bool [B, size]: positions below the row's length, and the last ``window`` of the ``total`` positions it sees."""
    position = jax.lax.broadcasted_iota(jnp.int32, (lengths.shape[0], size), 1)
    mask = position < lengths[:, None]
    if window is None:
        return mask
    # Cache positions come after the prompt: both are counted back from the end of what the row has written.
    return mask & (position >= (total - window)[:, None])


def _scores(q, k, scale, soft_cap, dtype):
    """[B, KV, g, S] in ``dtype``."""
    s = jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=dtype) * scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def _softmax_average(parts, dtype):
    """sum_s softmax(scores)_s values_s over all parts jointly; zeros for a row that sees nothing.

    Masked values never take part, so that a cache may hold anything there, NaN included.
    """
    masked = [jnp.where(mask[:, None, None], s, -jnp.inf) for s, _, mask in parts]
    highest = jnp.full(masked[0].shape[:3], jnp.finfo(dtype).min, dtype)
    for s in masked:
        highest = jnp.maximum(highest, jnp.max(s, axis=-1))
    total = jnp.zeros_like(highest)
    average = jnp.zeros((), dtype)
    for s, (_, v, mask) in zip(masked, parts, strict=True):
        p = jnp.exp(s - highest[..., None])
        total += jnp.sum(p, axis=-1)
        v = jnp.where(mask[:, :, None, None], v, 0)
        average += jnp.einsum("bkgs,bskd->bkgd", p.astype(v.dtype), v, preferred_element_type=dtype)
    return average / jnp.where(total > 0, total, 1)[..., None]
