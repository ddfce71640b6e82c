"""A TPU kernel: blocks of positions stream past the queries that see them, from the first such block to the last.

It runs twice: over prompts, for a few rows of one prompt at a time, which so is read once for all of them, and over the
rows' own positions. What they find, averages in the queries' type, is merged by log-sum-exp.

A block's key heads are taken as rows of one matrix, [positions x KV, hd], which is how they lie in memory: every query is
multiplied with every head, and the scores of foreign heads are masked. A matrix unit loads the keys once either way, and
nothing is transposed. Layer, entry and block are looked up by the index maps from prefetched scalars, so that neither a
layer nor a prompt is copied out of its cache. The steps that are left when an entry is done repeat its last block, which
fetches nothing, and compute nothing. Each pass is an online softmax in fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.decode_attention import spans
from kernels.decode_attention.sharing import LOG2E, LOWEST, Seen, merged, share_prompts
from kernels.integers import div, rem
from kernels.tpu import LANES, VMEM_BYTES

# Keys or values of a step, a guess: with both, a quarter of a microsecond of reading or more, which is a step's overhead.
STEP_BYTES = 2**20
QUERIES = 128  # of the rows that share a step, if one has fewer: what a matrix unit multiplies at a time


def rows_together(num_heads: int) -> int:
    """Rows of a prompt that share a step."""
    return max(QUERIES // num_heads, 1)


def fills_lanes(queries: jax.Array) -> bool:
    """Whether heads of this width and type are what a TPU reads without padding them."""
    return queries.shape[-1] % LANES == 0 and queries.dtype != jnp.float64


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
    *,
    block: int | None = None,
    interpret: object = False,
) -> jax.Array:
    """[B, H, hd] in the queries' dtype; arguments as in the public function, validated there; prompt is
    (keys, values, lens, index). ``block``: positions of a step.

    Raises:
        ValueError: float64, which no TPU has.
    """
    operands = jnp.result_type(queries, keys, values)
    if operands == jnp.float64:
        raise ValueError('decode_attention: implementation="pallas_tpu" takes fp32 at most, not float64; use "xla"')
    num_rows, num_heads, _ = queries.shape
    attend = functools.partial(_attend, layer=layer, soft_cap=soft_cap, scale=scale, block=block, interpret=interpret)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    start, stop = spans.bounds(lengths, keys.shape[-3], lengths, window)
    averages, levels = (x[:, 0] for x in attend(queries[:, None], keys, values, Seen(row, start, stop, None)))
    if prompt is None:
        return averages
    prompt_keys, prompt_values, lens, index = prompt
    most = rows_together(num_heads)
    size = prompt_keys.shape[-3]
    parts, seen = share_prompts(lengths, lens, index, size, most, num_shards=num_shards, window=window)
    shared = attend(queries[parts.members(most)], prompt_keys, prompt_values, seen)
    at = parts.part * most + parts.place
    shared_averages, shared_levels = (x.reshape(-1, *x.shape[2:])[at] for x in shared)
    return merged([shared_averages, averages], [shared_levels, levels], lengths > 0)


def _attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: Seen,
    *,
    layer: jax.Array | None,
    soft_cap: float | None,
    scale: jax.Array | float,
    block: int | None,
    interpret: object,
) -> tuple[jax.Array, jax.Array]:
    """Averages [T, rows, H, hd] for queries [T, rows, H, hd], in their type, and log2-sum-exp2 [T, rows, H] in fp32."""
    operands = jnp.result_type(queries, keys, values)
    num_steps, rows, num_heads, head_dim = queries.shape
    num_kv, num_queries, stacked = keys.shape[-2], rows * num_heads, layer is not None
    size = min(block or choose_block(num_queries, num_kv, head_dim, keys.dtype), keys.shape[-3])

    def kernel(layer_ref, entry_ref, start_ref, stop_ref, scale_ref, *refs):
        del layer_ref, entry_ref
        since_refs, refs = refs[: seen.since is not None], refs[seen.since is not None :]
        query_ref, key_ref, value_ref, out_ref, level_ref, highest, total, average = refs
        at, step = pl.program_id(0), pl.program_id(1)
        start, stop = start_ref[at], stop_ref[at]
        here = (div(start, size) + step) * size

        @pl.when(step == 0)
        def _():
            highest[...] = jnp.full_like(highest, LOWEST)
            total[...] = jnp.zeros_like(total)
            average[...] = jnp.zeros_like(average)

        @pl.when(here < stop)
        def _():
            flat = lambda ref: ref[...].reshape(-1, head_dim)
            s = _dot(query_ref[...].astype(operands), flat(key_ref).astype(operands), 1) * scale_ref[0, 0]
            s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
            inside = lambda i, first: (i >= (first - here) * num_kv) & (i < (stop - here) * num_kv)
            column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            query = jax.lax.broadcasted_iota(jnp.int32, (num_queries, 1), 0)
            head = div(rem(query, num_heads), num_heads // num_kv)
            first = since_refs[0][...] if since_refs else start
            s = jnp.where((rem(column, num_kv) == head) & inside(column, first), s, -jnp.inf)
            v = flat(value_ref)
            row = jax.lax.broadcasted_iota(jnp.int32, (v.shape[0], 1), 0)
            v = jnp.where(inside(row, start), v, 0)  # 0 * NaN is NaN
            top = jnp.maximum(highest[...], jnp.max(s, axis=1, keepdims=True))
            p, fade = jnp.exp(s - top), jnp.exp(highest[...] - top)
            total[...] = fade * total[...] + jnp.sum(p, axis=1, keepdims=True)
            average[...] = fade * average[...] + _dot(p.astype(v.dtype), v, 0)
            highest[...] = top

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            whole = jnp.where(total[...] > 0, total[...], 1)
            out_ref[...] = (average[...] / whole).astype(out_ref.dtype)
            level_ref[...] = (highest[...] + jnp.log(whole)) * LOG2E

    def of_cache(at, step, layer_ref, entry_ref, start_ref, stop_ref):
        here = fetched(step, start_ref[at], stop_ref[at], size)
        return *((layer_ref[0],) if stacked else ()), entry_ref[at], here, 0, 0

    of_queries = lambda width: pl.BlockSpec((None, num_queries, width), lambda at, *_: (at, 0, 0))
    cache = pl.BlockSpec((*((None,) if stacked else ()), None, size, num_kv, head_dim), of_cache)
    column = pltpu.VMEM((num_queries, 1), jnp.float32)
    since = () if seen.since is None else (jnp.repeat(seen.since, num_heads, axis=1)[..., None],)
    shape = num_steps, num_queries
    arrays = queries, keys, values, seen.stop
    averages, levels = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_steps, pl.cdiv(keys.shape[-3], size)),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                *[of_queries(1) for _ in since],
                of_queries(head_dim),
                cache,
                cache,
            ],
            out_specs=[of_queries(head_dim), of_queries(1)],
            scratch_shapes=[column, column, pltpu.VMEM((num_queries, head_dim), jnp.float32)],
        ),
        out_shape=[
            dispatch.result((*shape, head_dim), queries.dtype, *arrays),
            dispatch.result((*shape, 1), jnp.float32, *arrays),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        seen.entry,
        seen.start,
        seen.stop,
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        *since,
        queries.reshape(*shape, head_dim),
        keys,
        values,
    )
    return averages.reshape(queries.shape), levels.reshape(queries.shape[:3])


def fetched(step: jax.Array, start: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """The block of ``size`` positions that a span's step needs: its first before it begins, its last once it is done."""
    return jnp.minimum(div(start, size) + jnp.maximum(step, 0), div(jnp.maximum(end - 1, 0), size))


def choose_block(num_queries: int, num_kv: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Positions of a step: a power of two, as many as are worth a step of the grid and as memory holds."""
    width = jnp.dtype(dtype).itemsize
    heads = max(4 // width, 1 << (num_kv - 1).bit_length())  # as tiles pad them: one of 16 bits to two
    position = heads * pl.cdiv(head_dim, LANES) * LANES * width  # bytes of keys
    # Two blocks of the keys and values of two caches, their masked values, and scores with their temporaries.
    used = lambda block: block * (10 * position + 6 * 4 * num_queries * num_kv)
    block = 16
    while 4 * block * position <= STEP_BYTES and used(2 * block) <= VMEM_BYTES:
        block *= 2
    return block


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """a's columns against axis ``contract`` of b, in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
