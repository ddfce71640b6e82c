"""A Hopper kernel (Mosaic GPU): blocks of positions stream past the rows that see them.

A task is a run of positions of one entry of a cache, and the rows that see it: one row for its own entry, and as many of a
prompt's rows as one product of the tensor cores has room for, so that a prompt is read once and not once a row. A block of
threads does a task for one key head, by an online softmax in fp32. What tasks find for a row, averages in the queries' type,
is merged by log-sum-exp.

Keys and values arrive by the tensor memory accelerator, ``stages`` blocks of positions ahead of the tensor cores, straight
from the caches: layer, row and prompt are coordinates, so that nothing is copied out of a stack, and what lies past a length
is not read, but for the rest of the last block. The queries of a key head are padded to the 64 rows of a product; reading is
what takes the time. They stay in shared memory: a product's operand in registers that the loop never changes was given the
registers of the weights by ptxas 13.0 where blocks are as long as heads are wide, and lost after the first block.

``python -m kernels.bench --op decode_attention``, jax 0.11.2, microseconds a layer of stacked ones in a compiled loop, bf16:
128 rows of 256 to 1280 positions, 8 key heads of 128 and 16 query heads on an H200, 115, or 84% of that run's copy rate,
without temporary memory ("packed_xla" 548, "xla" 926; in another run cuDNN took 445, on layers cut out of the stack). With 8
prompts of up to 2048 positions, and rows of up to 512, 101 on an H100, where to read a prompt for each of its rows took 213.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.decode_attention import spans
from kernels.decode_attention.sharing import LOG2E, LOWEST, merged, share_prompts
from kernels.integers import div, rem

QUERIES = 64  # rows of a tensor core's product
WANTED = 2 * 132  # blocks of threads: two on each multiprocessor


class Tiles(NamedTuple):
    """Positions of a block, blocks in flight, and the tasks that the positions of a prompt and of a row are cut into.

    Blocks of fewer than 64 positions (32, 48) never come back on an H200 under jax 0.11.2, without a word.
    """

    block: int
    stages: int
    shared: int
    own: int


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
    most = QUERIES // group  # rows of a prompt in a task
    caches = [(keys, values)] if prompt is None else [(keys, values), prompt[:2]]
    entries, sizes = zip(*(k.shape[-4:-2] for k, _ in caches), strict=True)
    parts, table, since, num_parts = None, (), (), 0
    if prompt is not None:
        parts, seen = share_prompts(lengths, *prompt[2:], sizes[1], most, num_shards=num_shards, window=window)
        num_parts = len(parts.count)
        table = parts.count, parts.first, seen.entry, seen.start, seen.stop
        if seen.since is not None:
            since = seen.since[:, jnp.minimum(jnp.arange(QUERIES) // group, most - 1)]
    tiles = tiles or choose_tiles(num_rows * num_kv, sizes[0], num_parts * num_kv, sizes[-1])
    block, stages = tiles.block, tiles.stages
    num_shared = num_parts * tiles.shared  # tasks of prompts; they come first
    slots = tiles.own + (tiles.shared if parts else 0)  # averages of a row

    def kernel(factor_ref, layer_ref, window_ref, length_ref, order_ref, table_refs, since_ref, query_ref, *refs):
        cache_refs, out_ref, level_ref, rows, query_smem, key_smem, value_smem, since_smem, *barriers = refs
        keys_here, values_here, row_here, rows_here = barriers
        task, head = jax.lax.axis_index("task"), jax.lax.axis_index("head")
        shared, heads = task < num_shared, pl.ds(head * group, group)
        row, slot = rem(jnp.maximum(task - num_shared, 0), num_rows), div(task - num_shared, num_rows)
        length = length_ref[row]
        span = spans.bounds(length, sizes[0], length, None if window is None else window_ref[0])
        found = jnp.int32(1), row, row, *span, slot, jnp.int32(tiles.own)
        if parts:
            part = rem(task, num_parts)
            of_part = (
                *(ref[jnp.where(shared, part, 0)] for ref in table_refs),
                div(task, num_parts),
                tiles.shared,
            )
            found = (jnp.where(shared, a, b) for a, b in zip(of_part, found, strict=True))
        count, first, entry, start, stop, slot, pieces = found
        block_of = lambda i: div(start, block) + jax.lax.div(i * steps, pieces)
        steps = jnp.maximum(div(stop + (block - 1), block) - div(start, block), 0)
        begin, end = block_of(slot), block_of(slot + 1)

        def fetch(step):
            for i, (key_ref, value_ref) in enumerate(cache_refs):
                at = layer_ref[0] * entries[i] + entry, pl.ds(step * block, block), pl.ds(head * head_dim, head_dim)
                pl.when((step < end) & (shared == bool(i)))(
                    functools.partial(load, key_ref.at[at], value_ref.at[at], rem(step, stages))
                )

        def load(keys, values, to):
            plgpu.copy_gmem_to_smem(keys, key_smem.at[to], keys_here.at[to])
            plgpu.copy_gmem_to_smem(values, value_smem.at[to], values_here.at[to])

        def collect():
            @pl.when(~shared)
            def _():
                plgpu.copy_gmem_to_smem(query_ref.at[row, heads], rows.at[:group], row_here)
                plgpu.barrier_wait(row_here)

            @pl.when(shared)
            def _():
                @pl.loop(0, most)
                def _(i):
                    member = order_ref[first + jnp.minimum(i, count - 1)]
                    to = rows.at[pl.ds(i * group, group)]
                    plgpu.copy_gmem_to_smem(query_ref.at[member, heads], to, rows_here)

                if parts and window is not None:
                    plgpu.copy_gmem_to_smem(since_ref.at[part], since_smem, rows_here)
                plgpu.barrier_wait(rows_here)

            query_smem[...] = rows[...]
            plgpu.commit_smem()

        def attend(since, step, carry):
            average, highest, total = carry
            here, at = rem(step, stages), step * block
            plgpu.barrier_wait(keys_here.at[here])
            scores = jnp.zeros((QUERIES, block), jnp.float32)
            s = _product(query_smem, key_smem.at[here], scores, transpose=True) * factor_ref[0]
            s = s if soft_cap is None else (soft_cap * LOG2E) * jnp.tanh(s)
            position = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            visible = position < stop - at
            if window is not None:
                visible &= position >= _columns(since - at, block)
            s = jnp.where(visible, s, -jnp.inf)
            top = jnp.maximum(highest, jnp.max(s, axis=1))
            p, fade = jnp.exp2(s - _columns(top, block)), jnp.exp2(highest - top)
            total = fade * total + jnp.sum(p, axis=1)

            plgpu.barrier_wait(values_here.at[here])

            @pl.when((start > at) | (stop < at + block))
            def _():  # 0 * NaN is NaN
                v = value_smem[here]
                position = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
                value_smem[here] = jnp.where((position >= start - at) & (position < stop - at), v, jnp.zeros_like(v))
                plgpu.commit_smem()

            average = _product(p.astype(dtype), value_smem.at[here], _columns(fade, head_dim) * average)
            fetch(step + stages)
            return average, top, total

        def give():
            @pl.when(~shared)
            def _():
                to = out_ref.at[slots - tiles.own + slot, row, heads]
                plgpu.copy_smem_to_gmem(rows.at[:group], to)

            @pl.when(shared)
            def _():
                @pl.loop(0, count)
                def _(i):
                    to = out_ref.at[slot, order_ref[first + i], heads]
                    plgpu.copy_smem_to_gmem(rows.at[pl.ds(i * group, group)], to)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(count > 0)
        def _():
            for ahead in range(stages):
                fetch(begin + ahead)
            collect()
            since = jnp.full((QUERIES,), start)
            if parts and window is not None:
                since += jnp.full((QUERIES,), shared.astype(jnp.int32)) * (since_smem[...] - since)
            zero, column = jnp.zeros((QUERIES, head_dim), jnp.float32), jnp.zeros((QUERIES,), jnp.float32)
            carry = zero, column + LOWEST, column
            average, highest, total = jax.lax.fori_loop(begin, end, functools.partial(attend, since), carry)
            total = jnp.where(total > 0, total, 1)
            rows[...] = (average / _columns(total, head_dim)).astype(dtype)
            if slots > 1:
                level_ref[task, head] = highest + LOG2E * jnp.log(total)
            plgpu.commit_smem()
            give()

    one = lambda x: jnp.asarray(0 if x is None else x, jnp.int32).reshape(1)
    tiles_of_128_bytes = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    blocks = plgpu.SMEM((stages, block, head_dim), dtype, transforms=tiles_of_128_bytes)
    num_tasks = num_shared + num_rows * tiles.own
    averages, levels = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((slots, *queries.shape), dtype),
            jax.ShapeDtypeStruct((num_tasks if slots > 1 else 1, num_kv, QUERIES), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((QUERIES, head_dim), dtype),
            plgpu.SMEM((QUERIES, head_dim), dtype, transforms=tiles_of_128_bytes),
            blocks,
            blocks,
            plgpu.SMEM((QUERIES,), jnp.int32),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=most + (window is not None)),
        ],
        grid=(num_tasks, num_kv),
        grid_names=("task", "head"),
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
        parts.order if parts else lengths,
        table,
        since,
        queries,
        # A position's heads side by side: five coordinates are what the accelerator takes, tiles included.
        tuple(tuple(x.reshape(-1, x.shape[-3], num_kv * head_dim) for x in cache) for cache in caches),
    )
    averages, levels = (dispatch.varying(x, queries, keys, values, lengths) for x in (averages, levels))
    if slots == 1:
        return averages[0]
    own = levels[num_shared:, :, :group].reshape(tiles.own, num_rows, num_heads)
    found = list(own)
    if parts:
        query = jnp.arange(num_heads, dtype=jnp.int32)[None]
        at = (parts.part[:, None] * num_kv + query // group) * QUERIES + parts.place[:, None] * group + query % group
        shared = levels[:num_shared].reshape(tiles.shared, -1)
        found = [level.at[at].get(mode="promise_in_bounds") for level in shared] + found
    return merged(list(averages), found, lengths > 0)


def choose_tiles(heads: int, size: int, shared_heads: int = 0, width: int = 0) -> Tiles:
    """For so many pairs of a row and a key head, whose caches have ``size`` positions, and so many of a part of a prompt's
    rows and a key head, with ``width`` positions: tasks for a full chip, of 4 blocks at least.

    Two blocks of 64 positions in flight, so that two blocks of threads fit on a multiprocessor: on an H200, 128 rows of 256
    to 1280 positions took 126 us, and 142 to 152 with one block of threads there and 3, 4 or 6 in flight, or 2 or 3 of 128.
    """
    fill = lambda tasks, positions: max(1, min(WANTED // max(tasks, 1), positions // (4 * 64)))
    return Tiles(64, 2, fill(shared_heads, width), fill(heads, size))


def _columns(x: jax.Array, count: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, (x.shape[0], count), [0])


def _product(a, b, onto: jax.Array, transpose: bool = False) -> jax.Array:
    """onto + a @ b in fp32, or a @ b^T; a in registers or shared memory, b in shared memory."""
    b = b.transpose((1, 0)) if transpose else b
    return cast(jax.Array, pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(onto)))
