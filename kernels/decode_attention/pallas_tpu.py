"""A TPU kernel: blocks of positions stream past a row's queries, from the first block that the row sees to the last.

A block's key heads are taken as rows of one matrix, [positions x KV, hd], which is how they lie in memory: every query is
multiplied with every head, and the scores of foreign heads are masked. A matrix unit loads the keys once either way, and
nothing is transposed. Layer, row and block are looked up by the index maps from prefetched scalars, so that neither a layer
nor a prompt is copied out of its cache. The steps that are left when a row is done repeat its last block, which fetches
nothing, and compute nothing. Prompt and cache share one online softmax in fp32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.decode_attention import spans
from kernels.tpu import LANES, VMEM_BYTES

# Keys and values of a step by generation, a guess: a third of a microsecond of reading or more, which is a step's overhead.
STEP_BYTES = {"v5e": 2**20, "v5p": 2**20, "v6e": 2**20, "tpu7x": 2**21}


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
    num_rows, num_heads, head_dim = queries.shape
    num_kv = keys.shape[-2]
    stacked = layer is not None
    block = block or choose_block(num_heads, num_kv, head_dim, keys.dtype)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    # What each row sees of each cache: its entry there, and positions start .. end - 1; all [B].
    caches, seen = [(keys, values)], [(row, *spans.bounds(lengths, keys.shape[-3], lengths, window))]
    if prompt is not None:
        prompt_keys, prompt_values, lens, index = prompt
        entry = spans.prompt_entry(row, index, num_rows, lens.shape[0], num_shards)
        own = jnp.where(lengths > 0, lens[entry], 0)
        caches.insert(0, (prompt_keys, prompt_values))
        seen.insert(0, (entry, *spans.bounds(own, prompt_keys.shape[-3], own + lengths, window)))
    sizes = [min(block, k.shape[-3]) for k, _ in caches]
    steps = [pl.cdiv(k.shape[-3], size) for (k, _), size in zip(caches, sizes, strict=True)]
    begins = [sum(steps[:i]) for i in range(len(steps))]  # the grid's step of each cache's first

    def kernel(layer_ref, *refs):
        del layer_ref
        span_refs, refs = refs[: 3 * len(steps)], refs[3 * len(steps) :]
        scale_ref, query_ref, *cache_refs, out_ref, highest, total, average = refs
        row, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _():
            highest[...] = jnp.full_like(highest, jnp.finfo(jnp.float32).min)
            total[...] = jnp.zeros_like(total)
            average[...] = jnp.zeros_like(average)

        def attend(key_ref, value_ref, first, last):
            """The positions first .. last - 1 of a block, counted from its own start."""
            flat = lambda ref: ref[...].reshape(-1, head_dim)
            s = _dot(query_ref[...].astype(operands), flat(key_ref).astype(operands), 1) * scale_ref[0, 0]
            s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
            inside = lambda i: (i >= first * num_kv) & (i < last * num_kv)
            column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            head = spans.div(jax.lax.broadcasted_iota(jnp.int32, (num_heads, 1), 0), num_heads // num_kv)
            s = jnp.where((spans.rem(column, num_kv) == head) & inside(column), s, -jnp.inf)
            v = flat(value_ref)
            v = jnp.where(inside(jax.lax.broadcasted_iota(jnp.int32, (v.shape[0], 1), 0)), v, 0)  # 0 * NaN is NaN
            top = jnp.maximum(highest[...], jnp.max(s, axis=1, keepdims=True))
            p, fade = jnp.exp(s - top), jnp.exp(highest[...] - top)
            total[...] = fade * total[...] + jnp.sum(p, axis=1, keepdims=True)
            average[...] = fade * average[...] + _dot(p.astype(v.dtype), v, 0)
            highest[...] = top

        for i, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            _, start, end = (ref[row] for ref in span_refs[3 * i : 3 * i + 3])
            at = (spans.div(start, size) + step - begin) * size
            key_ref, value_ref = cache_refs[2 * i : 2 * i + 2]
            pl.when((step >= begin) & (at < end))(functools.partial(attend, key_ref, value_ref, start - at, end - at))

        @pl.when(step == sum(steps) - 1)
        def _():
            out_ref[...] = (average[...] / jnp.where(total[...] > 0, total[...], 1)).astype(out_ref.dtype)

    def cache_spec(i):
        def index(row, step, layer_ref, *span_refs):
            entry, start, end = (ref[row] for ref in span_refs[3 * i : 3 * i + 3])
            here = fetched(step - begins[i], start, end, sizes[i])
            return *((layer_ref[0],) if stacked else ()), entry, here, 0, 0

        return pl.BlockSpec((*((None,) if stacked else ()), None, sizes[i], num_kv, head_dim), index)

    of_row = pl.BlockSpec((None, num_heads, head_dim), lambda row, *_: (row, 0, 0))
    column = pltpu.VMEM((num_heads, 1), jnp.float32)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + 3 * len(steps),
        grid=(num_rows, sum(steps)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), of_row]
        + [cache_spec(i) for i in range(len(steps)) for _ in "kv"],
        out_specs=of_row,
        scratch_shapes=[column, column, pltpu.VMEM((num_heads, head_dim), jnp.float32)],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=dispatch.result(queries.shape, queries.dtype, queries, keys, values, lengths),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1),
        *(x for span in seen for x in span),
        jnp.asarray(scale, jnp.float32).reshape(1, 1),
        queries,
        *(x for cache in caches for x in cache),
    )


def fetched(step: jax.Array, start: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """The block of ``size`` positions that a span's step needs: its first before it begins, its last once it is done."""
    return jnp.minimum(spans.div(start, size) + jnp.maximum(step, 0), spans.div(jnp.maximum(end - 1, 0), size))


def choose_block(num_heads: int, num_kv: int, head_dim: int, dtype: jnp.dtype, generation: str | None = None) -> int:
    """Positions of a step: a power of two, as many as are worth a step of the grid and as memory holds."""
    width = jnp.dtype(dtype).itemsize
    heads = max(4 // width, 1 << (num_kv - 1).bit_length())  # as tiles pad them: one of 16 bits to two
    position = heads * pl.cdiv(head_dim, LANES) * LANES * width  # bytes of keys
    # Two blocks of the keys and values of two caches, their masked values, and scores with their temporaries.
    used = lambda block: block * (10 * position + 6 * 4 * num_heads * num_kv)
    block = 16
    while 4 * block * position <= STEP_BYTES.get(generation or "", 2**20) and used(2 * block) <= VMEM_BYTES:
        block *= 2
    return block


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """a's columns against axis ``contract`` of b, in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
