"""A Hopper kernel (Mosaic GPU): one block of threads a row and key head, past which the positions that it sees stream.

Keys and values arrive by the tensor memory accelerator, ``stages`` blocks of positions ahead of the tensor cores, straight
from the caches: layer, row and prompt are coordinates, so that nothing is copied out of a stack, and what lies past a row's
length is not read, but for the rest of its last block. The queries of a key head are padded to the 64 rows of a product;
reading is what takes the time. They stay in shared memory: a product's operand in registers that the loop never changes was
given the registers of the weights by ptxas 13.0 where blocks are as long as heads are wide, and lost after the first block.
Prompt and cache share one online softmax in fp32. When rows are too few to keep the chip busy, several blocks of threads
share one's positions, and their averages are merged by log-sum-exp.

On one H200 with jax 0.11.2 (``python -m kernels.bench --op decode_attention``), microseconds a layer of 28 stacked ones in a
compiled loop, bf16, 128 rows of 256 to 1280 positions, 8 key heads of 128, 16 query heads: 115, or 3.56 TB/s of what the
lengths need, 86% of that run's copy rate, without temporary memory; "packed_xla" 546, "xla" 924. In another run cuDNN took
445, on layers cut out of the stack.
"""

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.decode_attention import spans

QUERIES = 64  # rows of a tensor core's product
WANTED = 2 * 132  # blocks of threads: two on each multiprocessor
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """Positions of a block, blocks in flight, and blocks of threads that share a row's positions."""

    block: int
    stages: int
    splits: int


class Turn(NamedTuple):
    """The steps begin .. end - 1, in which a row reads one cache."""

    begin: jax.Array
    end: jax.Array
    shift: jax.Array  # from a step to the cache's block
    entry: jax.Array
    start: jax.Array  # what is visible: positions start .. stop - 1
    stop: jax.Array


def unfit(queries: jax.Array, keys: jax.Array, prompt: tuple | None) -> str:
    """What the kernel would take instead of these arrays; empty if it takes them."""
    head_dim, group = queries.shape[-1], queries.shape[-2] // keys.shape[-2]
    sizes = [k.shape[-3] for k in (keys, *(prompt or ())[:1])]  # positions of each cache
    types = {str(x.dtype) for x in (queries, keys, *(prompt or ())[:2])}
    if types not in ({"bfloat16"}, {"float16"}):
        return f"queries and caches of one type, bf16 or fp16, not {' and '.join(sorted(types))}"
    if head_dim not in (64, 128):
        return f"heads of 64 or 128, not {head_dim}"
    if group > QUERIES:
        return f"at most {QUERIES} queries a key head, not {group}"
    if any(size % 8 for size in sizes):
        return f"caches of a multiple of 8 positions, not {' and '.join(map(str, sizes))}"
    return ""


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
    tiles: Tiles | None = None,
    interpret: object = None,
) -> jax.Array:
    """[B, H, hd] in the queries' dtype; arguments as in the public function, validated there; prompt is
    (keys, values, lens, index).

    Raises:
        ValueError: what ``unfit`` says.
    """
    if why := unfit(queries, keys, prompt):
        raise ValueError(f'decode_attention: implementation="pallas_hopper" takes {why}; use "packed_xla"')
    num_rows, num_heads, head_dim = queries.shape
    num_kv, dtype = keys.shape[-2], keys.dtype
    group = num_heads // num_kv
    caches = [(keys, values)] if prompt is None else [prompt[:2], (keys, values)]
    entries, sizes = zip(*(k.shape[-4:-2] for k, _ in caches), strict=True)
    block, stages, splits = tiles or choose_tiles(num_rows * num_kv, sum(sizes))
    wide = queries.dtype if splits == 1 else jnp.float32

    def kernel(
        factor_ref, layer_ref, window_ref, length_ref, lookup_refs, query_ref, cache_refs, out_ref, level_ref, *scratch
    ):
        rows, query_smem, key_smem, value_smem, rows_here, keys_here, values_here = scratch
        row, head, split = (jax.lax.axis_index(name) for name in ("row", "head", "split"))
        heads = pl.ds(head * group, group)
        plgpu.copy_gmem_to_smem(query_ref.at[row, heads], rows.at[:group], rows_here)

        length, since = length_ref[row], None if window is None else window_ref[0]
        seen = [(row, *spans.bounds(length, sizes[-1], length, since))]
        if prompt is not None:
            lens_ref, index_ref = lookup_refs
            entry = spans.prompt_entry(row, index_ref[row], num_rows, entries[0], num_shards)
            own = jnp.where(length > 0, lens_ref[entry], 0)
            seen.insert(0, (entry, *spans.bounds(own, sizes[0], own + length, since)))
        turns, steps = [], jnp.int32(0)
        for (entry, start, stop), count in zip(seen, entries, strict=True):
            first = spans.div(start, block)
            end = steps + jnp.where(start < stop, spans.div(stop + (block - 1), block) - first, 0)
            turns.append(Turn(steps, end, first - steps, layer_ref[0] * count + entry, start, stop))
            steps = end
        begin, end = spans.div(split * steps, splits), spans.div((split + 1) * steps, splits)

        def fetch(step):
            slot = spans.rem(step, stages)
            for turn, (key_ref, value_ref) in zip(turns, cache_refs, strict=True):
                at = turn.entry, pl.ds((step + turn.shift) * block, block), pl.ds(head * head_dim, head_dim)
                pl.when((step >= turn.begin) & (step < jnp.minimum(turn.end, end)))(
                    functools.partial(load, key_ref.at[at], value_ref.at[at], slot)
                )

        def load(keys, values, slot):
            plgpu.copy_gmem_to_smem(keys, key_smem.at[slot], keys_here.at[slot])
            plgpu.copy_gmem_to_smem(values, value_smem.at[slot], values_here.at[slot])

        for ahead in range(stages):
            fetch(begin + ahead)
        plgpu.barrier_wait(rows_here)
        query_smem[...] = rows[...].astype(dtype)
        plgpu.commit_smem()

        def attend(step, carry):
            average, highest, total = carry
            slot = spans.rem(step, stages)
            turn = (
                turns[0] if prompt is None else jax.tree.map(lambda a, b: jnp.where(step < turns[0].end, a, b), *turns)
            )
            at = (step + turn.shift) * block
            after = lambda i: True if window is None else i >= turn.start - at
            visible = lambda i: (i < turn.stop - at) & after(i)

            plgpu.barrier_wait(keys_here.at[slot])
            scores = jnp.zeros((QUERIES, block), jnp.float32)
            s = _product(query_smem, key_smem.at[slot], scores, transpose=True) * factor_ref[0]
            s = s if soft_cap is None else (soft_cap * LOG2E) * jnp.tanh(s)
            s = jnp.where(visible(jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)), s, -jnp.inf)
            top = jnp.maximum(highest, jnp.max(s, axis=1))
            p, fade = jnp.exp2(s - _columns(top, block)), jnp.exp2(highest - top)
            total = fade * total + jnp.sum(p, axis=1)

            plgpu.barrier_wait(values_here.at[slot])

            @pl.when((turn.start > at) | (turn.stop < at + block))
            def _():  # 0 * NaN is NaN
                v = value_smem[slot]
                inside = visible(jax.lax.broadcasted_iota(jnp.int32, v.shape, 0))
                value_smem[slot] = jnp.where(inside, v, jnp.zeros_like(v))
                plgpu.commit_smem()

            average = _product(p.astype(dtype), value_smem.at[slot], _columns(fade, head_dim) * average)
            fetch(step + stages)
            return average, top, total

        zero, column = jnp.zeros((QUERIES, head_dim), jnp.float32), jnp.zeros((QUERIES,), jnp.float32)
        average, highest, total = jax.lax.fori_loop(begin, end, attend, (zero, column - jnp.inf, column))
        total = jnp.where(total > 0, total, 1)
        rows[...] = (average / _columns(total, head_dim)).astype(wide)
        if splits > 1:
            level_ref[split, row, head] = highest + LOG2E * jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows.at[:group], out_ref.at[split, row, heads])
        plgpu.wait_smem_to_gmem(0)

    one = lambda x: jnp.asarray(0 if x is None else x, jnp.int32).reshape(1)
    tiles_of_128_bytes = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    blocks = plgpu.SMEM((stages, block, head_dim), dtype, transforms=tiles_of_128_bytes)
    averages, levels = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((splits, *queries.shape), wide),
            jax.ShapeDtypeStruct((splits, num_rows, num_kv, QUERIES), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((QUERIES, head_dim), wide),
            plgpu.SMEM((QUERIES, head_dim), dtype, transforms=tiles_of_128_bytes),
            blocks,
            blocks,
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(num_rows, num_kv, splits),
        grid_names=("row", "head", "split"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
        kernel_name="decode_attention",
    )(
        jnp.asarray(scale, jnp.float32).reshape(1) * (LOG2E if soft_cap is None else 1 / soft_cap),
        one(layer),
        one(window),
        lengths,
        () if prompt is None else prompt[2:],
        queries.astype(wide),
        # A position's heads side by side: five coordinates are what the accelerator takes, tiles included.
        tuple(tuple(x.reshape(-1, x.shape[-3], num_kv * head_dim) for x in cache) for cache in caches),
    )
    averages, levels = (dispatch.varying(x, queries, keys, values, lengths) for x in (averages, levels))
    if splits == 1:
        return averages[0]
    return _merged(averages, levels[..., :group].reshape(splits, num_rows, -1), queries.dtype)


def choose_tiles(heads: int, positions: int) -> Tiles:
    """For so many pairs of a row and a key head, of so many positions: splits for a full chip, of 4 blocks at least.

    Two blocks of 64 positions in flight, so that two blocks of threads fit on a multiprocessor: on an H200, the case above
    took 126 us, and 142 to 152 with one block of threads there and 3, 4 or 6 in flight, or 2 or 3 of 128 positions.
    """
    return Tiles(64, 2, max(1, min(WANTED // heads, positions // (4 * 64))))


def _merged(averages: jax.Array, levels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, hd] from the splits' averages [splits, B, H, hd] and log2-sum-exp2 [splits, B, H]."""
    weights = jnp.exp2(levels - jnp.maximum(jnp.max(levels, axis=0), jnp.finfo(levels.dtype).min))
    total = jnp.sum(weights, axis=0)
    weights /= jnp.where(total > 0, total, 1)
    return jnp.sum(weights[..., None] * averages, axis=0).astype(dtype)


def _columns(x: jax.Array, count: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, (x.shape[0], count), [0])


def _product(a, b, onto: jax.Array, transpose: bool = False) -> jax.Array:
    """onto + a @ b in fp32, or a @ b^T; a in registers or shared memory, b in shared memory."""
    b = b.transpose((1, 0)) if transpose else b
    return cast(jax.Array, pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(onto)))
