"""The meaning, in plain XLA: every position of the caches is scored, and what lies past a row's length is masked.

Two ways to take the products. ``decode_attention`` contracts per key-value head, which is right where small batched
products are cheap. ``packed`` sees a position's heads as one vector of KV x hd numbers and puts each query in its own
head's place among zeros: KV times the multiplications, but no transposed copy of the cache, which is what takes the
time on CPUs and GPUs.

On one H200, bf16, 128 rows, 1280 positions, 8 key heads of 128 and 16 query heads: 418 us per head, 235 us packed (2.9
TB/s of cache), of which the check for NaN is 17 us; clearing masked values every time would make it 412 us.

Microseconds a layer and step on 2 busy CPU cores, fp32, 4 query and 2 key heads, 8 rows a prompt, in a compiled loop:

    rows, cache, prompt, hd        per head, one array a layer / stacked      packed, one array a layer / stacked
    64, 32, 16, 16                 216 / 174                                  103 / 134
    128, 64, 32, 16                765 / 669                                  333 / 596
    128, 96, 32, 32                1812 / 1596                                887 / 1585

(multiply-and-sum in one fusion: 890 / 1095 in the middle row). The prompt cache is gathered every step: for 128 rows
of 32 positions of 2 x 16 that and its attention take 190 us, scores against every prompt with a mask 914, picked out
485, a one-hot product 191 / 285.
"""

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
    q, parts, dtype = _gathered(queries, keys, values, lengths, prompt, layer, num_shards, window)
    scores = [(_squash(_scores(q, k, dtype), scale, soft_cap), v, mask) for k, v, mask in parts]
    return _average(scores, _weighted, True, dtype).reshape(queries.shape).astype(queries.dtype)


def packed(
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
    """The same by products over all heads at once."""
    q, parts, dtype = _gathered(queries, keys, values, lengths, prompt, layer, num_shards, window)
    scores = [(_squash(_packed_scores(q, k, dtype), scale, soft_cap), v, mask) for k, v, mask in parts]
    # Clearing masked values costs a copy of them. They matter only when one is not finite: then do it again, cleared.
    fast = _average(scores, _packed_weighted, False, dtype)
    clean = lambda: _average(scores, _packed_weighted, True, dtype)
    out = jax.lax.cond(jnp.any(jnp.isnan(fast)), clean, lambda: fast)
    return out.reshape(queries.shape).astype(queries.dtype)


def _gathered(queries, keys, values, lengths, prompt, layer, num_shards, window):
    """Queries [B, KV, g, hd], the (keys, values, mask) of cache and prompt a row, and the dtype to accumulate in."""
    num_rows, num_heads, head_dim = queries.shape
    q = queries.reshape(num_rows, keys.shape[-2], num_heads // keys.shape[-2], head_dim)
    keys, values = _layer(keys, layer), _layer(values, layer)
    parts = [(keys, values, _visible(keys.shape[1], lengths, lengths, window))]
    if prompt is not None:
        prompt_keys, prompt_values, lens, index = prompt
        take = lambda x: _take_rows(x, index, num_shards)
        own_keys, own_values, lens = take(_layer(prompt_keys, layer)), take(_layer(prompt_values, layer)), take(lens)
        mask = _visible(own_keys.shape[1], lens, lens + lengths, window)
        parts.append((own_keys, own_values, mask & (lengths > 0)[:, None]))
    return q, parts, jnp.promote_types(queries.dtype, jnp.float32)


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


def _squash(s, scale, soft_cap):
    s = s * scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def _scores(q, k, dtype):
    """q k [B, KV, g, S] in ``dtype``."""
    return jnp.einsum("bkgd,bskd->bkgs", q, k, preferred_element_type=dtype)


def _weighted(p, v, dtype):
    """p v [B, KV, g, hd] in ``dtype``."""
    return jnp.einsum("bkgs,bskd->bkgd", p, v, preferred_element_type=dtype)


def _packed_scores(q, k, dtype):
    rows, num_kv, group, head_dim = q.shape
    own = jnp.eye(num_kv, dtype=bool)[None, :, None, :, None]
    wide = jnp.where(own, q[:, :, :, None, :], 0).reshape(rows, num_kv * group, num_kv * head_dim)
    flat = k.reshape(rows, k.shape[1], num_kv * head_dim)
    return jnp.einsum("bhc,bsc->bhs", wide, flat, preferred_element_type=dtype).reshape(rows, num_kv, group, -1)


def _packed_weighted(p, v, dtype):
    rows, num_kv, group, size = p.shape
    flat = v.reshape(rows, size, num_kv * v.shape[-1])
    out = jnp.einsum("bhs,bsc->bhc", p.reshape(rows, num_kv * group, size), flat, preferred_element_type=dtype)
    out = out.reshape(rows, num_kv, group, num_kv, v.shape[-1])
    return jnp.stack([out[:, head, :, head] for head in range(num_kv)], axis=1)


def _average(parts, weighted, clear, dtype):
    """sum_s softmax(scores)_s values_s over all parts jointly; zeros for a row that sees nothing.

    ``clear`` keeps masked values out of the products, so that NaN among them does no harm (0 * NaN).
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
        v = jnp.where(mask[:, :, None, None], v, 0) if clear else v
        average += weighted(p.astype(v.dtype), v, dtype)
    return average / jnp.where(total > 0, total, 1)[..., None]
