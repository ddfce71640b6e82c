"""Hopper kernels (wgmma and TMA, by Pallas Mosaic GPU): a block for each multiprocessor, which goes from tile to tile.

In a block one warpgroup loads and two multiply, each a slab of 64 rows of a tile 256 columns wide: what one stores is in
the shadow of what the other multiplies, and loads go on where a tile ends. ``hopper_tiles`` says which tiles there are.

* ``product``: slabs begin at any row. A group's last slab is moved back to end with its group, and repeats some rows of
  the one before (the same numbers, stored twice). Only a group of less than 64 rows is stored row by row.
* ``swiglu``: the same, but that a tile's columns are 128 of gate and the same 128 of up, joined before they are stored.
* ``weight_gradient``: rows are contracted, in blocks that begin at a multiple of 8. What a block holds of other groups
  counts as zero in lhs, and in g what lies beyond all groups: nothing comes from there, but a NaN of g can reach the
  gradient of the next group.

One H200, bf16, uneven groups (Dirichlet(2) multinomial), ms of the product and of both gradients, in brackets those of
``torch._grouped_mm`` 2.11 in the same run (python -m kernels.bench; a dense product 709 TFLOP/s), and of ``swiglu``, in
brackets of two products and a join:

    T=65536 E=128 2048->768    0.362 (0.405) 0.732 (0.850)  0.740 (0.793)
    T=65536 E=128 768->2048    0.362 (0.459) 0.731 (0.805)
    T=2048  E=128 2048->768    0.115 (0.138) 0.265 (0.351)  0.204 (0.223)
    T=65536 E=8   4096->14336  11.3  (12.0)  22.8  (23.4)   23.2  (24.0)

The first shape with other groups: uniform 0.349 (0.388) and 0.714 (0.841), Dirichlet(0.3) 0.359 (0.394) and 0.764 (0.915),
half of them empty 0.328 (0.389) and 0.716 (0.835), all rows in one 0.299 (0.314) and 1.006 (1.084): there the weight
gradient has but 48 tiles for 132 multiprocessors. Masking g for neighbours too costs the weight gradient 6%.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.grouped_matmul.hopper_pipeline import (
    COLUMNS,
    LINE,
    STAGES,
    STORES,
    Ring,
    kernel,
    store_slabs,
    tiled,
    two_views,
    views,
    work,
)
from kernels.grouped_matmul.hopper_tiles import SLAB, TEAM, by_size, num_doubles, place, row_tiles
from kernels.integers import div, rem

STEP = 64  # contracted at a time
NO_GROUP = 2**30


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool,
    dtype: jnp.dtype,
    blocks: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[M, N] in ``dtype``. ``ValueError``: what ``refusal`` says."""
    _check("grouped_matmul", dtype, lhs, rhs)
    options = dict(transpose_rhs=transpose_rhs, dtype=dtype, blocks=blocks, interpret=interpret)
    return _by_row_tiles("grouped_matmul", lambda slab: slab, lhs, (rhs,), group_sizes, **options)


def swiglu(
    lhs: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    blocks: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[M, N] in ``dtype``: silu(lhs gate) * (lhs up) by groups, in fp32 and rounded once. ``ValueError``: as ``product``."""
    _check("grouped_swiglu", dtype, lhs, gate, up)
    options = dict(transpose_rhs=False, dtype=dtype, blocks=blocks, interpret=interpret)
    return _by_row_tiles("grouped_swiglu", _silu_times, lhs, (gate, up), group_sizes, **options)


def _silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    root = jax.lax.rsqrt(1 + jnp.exp(-gate))  # an instruction of the hardware's, where a division of fp32 branches
    return gate * root * root * up


def _by_row_tiles(name, join, lhs, matrices, group_sizes, *, transpose_rhs, dtype, blocks, interpret):
    """``join`` of the products with each of ``matrices``, which share a tile's columns evenly."""
    (num_rows, depth), rhs = lhs.shape, matrices[0]
    width, columns = rhs.shape[1 if transpose_rhs else 2], COLUMNS // len(matrices)
    out = jax.ShapeDtypeStruct((num_rows, width), dtype)
    if 0 in (num_rows, depth, width, len(rhs)):
        return jnp.zeros(out.shape, dtype)
    tile = (columns, STEP) if transpose_rhs else (STEP, columns)
    memory = [
        two_views((STAGES, TEAM, SLAB, STEP), lhs.dtype, interpret),
        tiled((STAGES, len(matrices), *tile), rhs.dtype),
        two_views((TEAM, STORES, SLAB, LINE // dtype.itemsize), dtype, interpret),
        plgpu.Barrier(num_arrivals=TEAM + len(matrices), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=TEAM, num_barriers=STAGES),
    ]
    body = functools.partial(_product, join=join, transpose_rhs=transpose_rhs, interpret=interpret)
    # Lanes, because two views of one memory are beyond the layouts that jax 0.10 infers for warpgroups.
    run = kernel(name, body, out, memory, plgpu.LoweringSemantics.Lane, blocks, interpret)
    made = run(*row_tiles(group_sizes, num_rows), lhs, *matrices)
    return dispatch.varying(made, lhs, *matrices, group_sizes)


class _ProductTile(NamedTuple):
    group: jax.Array
    first: jax.Array
    second: jax.Array
    end: jax.Array
    column: jax.Array


def _product(*refs, join: Callable, transpose_rhs: bool, interpret: Any):
    group, first, second, end, counts, lhs, *matrices, out, lhs_memory, rhs_tiles, out_memory, full, empty = refs
    lhs_rows, lhs_tiles = views(lhs_memory, interpret)
    out_rows, out_tiles = views(out_memory, interpret)
    me, ring = jax.lax.axis_index("warpgroup"), Ring(full, empty)
    width = COLUMNS // len(matrices)
    columns = pl.cdiv(out.shape[1], width)

    blocks = jax.lax.axis_size("block")
    steps_of = lambda tile: jnp.where(tile.group < matrices[0].shape[0], jnp.int32(pl.cdiv(lhs.shape[1], STEP)), 0)

    doubles = num_doubles(lhs.shape[0], matrices[0].shape[0])
    totals = [counts[kind] * columns for kind in range(2)]

    def nth(kind, index):
        rows = jnp.maximum(counts[kind], 1)
        row, column = place(jnp.minimum(index, rows * columns - 1), rows, columns)
        row += kind * doubles
        return _ProductTile(
            jnp.where(index < totals[kind], group[row], NO_GROUP), first[row], second[row], end[row], column
        )

    def find(cursors):
        """The next tile of either kind, that of the earlier group: all of a group's are worked on at about the same time."""
        double, single = map(nth, range(2), cursors)
        alone = single.group < double.group
        tile = _ProductTile(*(jnp.where(alone, b, a) for a, b in zip(double, single, strict=True)))
        return tile, (cursors[0] + jnp.where(alone, 0, blocks), cursors[1] + jnp.where(alone, blocks, 0))

    def load(tile, step):
        def fetch(k, slot):
            ks, ns = pl.ds(k * STEP, STEP), pl.ds(tile.column * width, width)
            for i, rhs in enumerate(matrices):
                weights = rhs.at[tile.group, ns, ks] if transpose_rhs else rhs.at[tile.group, ks, ns]
                plgpu.copy_gmem_to_smem(weights, rhs_tiles.at[slot, i], full.at[slot])
            plgpu.copy_gmem_to_smem(lhs.at[pl.ds(tile.first, SLAB), ks], lhs_rows.at[slot, 0], full.at[slot])

            @pl.when(tile.second < tile.end)
            def _():
                plgpu.copy_gmem_to_smem(lhs.at[pl.ds(tile.second, SLAB), ks], lhs_rows.at[slot, 1], full.at[slot])

            @pl.when(tile.second >= tile.end)
            def _():
                plgpu.barrier_arrive(full.at[slot])

        return ring.fill(steps_of(tile), step, fetch)

    def multiply(tile, step):
        steps = steps_of(tile)
        row = jnp.where(me == 0, tile.first, tile.second)

        def operands(k, slot):
            weights = [rhs_tiles.at[slot, i] for i in range(len(matrices))]
            return lhs_tiles.at[slot, me], *(w.transpose((1, 0)) if transpose_rhs else w for w in weights)

        def store(slot, at):
            piece, columns = out_rows.at[me, slot], pl.ds(tile.column * width + at, out_rows.shape[-1])

            @pl.when(row + SLAB <= tile.end)
            def _():
                plgpu.copy_smem_to_gmem(piece, out.at[pl.ds(row, SLAB), columns], commit_group=False)

            @pl.when(row + SLAB > tile.end)
            def _():
                @pl.loop(0, tile.end - row)
                def _(i):
                    to = out.at[pl.ds(row + i, 1), columns]
                    plgpu.copy_smem_to_gmem(piece.at[pl.ds(i, 1)], to, commit_group=False)

        @pl.when(row < tile.end)
        def _():
            store_slabs(join, ring.multiply(steps, step, operands, len(matrices)), out_tiles.at[me], store)

        @pl.when(row >= tile.end)
        def _():
            ring.skip(steps, step)

        return step + steps

    # Each kind is dealt to the blocks in turn, singles from where doubles end: a block gets as many as others, but one.
    block = jax.lax.axis_index("block")
    cursors = block, rem(block + blocks - rem(totals[0], blocks), blocks)
    number = [div(total - at + blocks - 1, blocks) for total, at in zip(totals, cursors, strict=True)]
    work(ring, number[0] + number[1], cursors, find, load, multiply)


def weight_gradient(
    lhs: jax.Array,
    g: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    blocks: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """[E, K, N] in ``dtype``: lhs^T g within each group. ``ValueError``: what ``refusal`` says."""
    _check("grouped_matmul", dtype, lhs, g)
    (num_rows, depth), width = lhs.shape, g.shape[1]
    out = jax.ShapeDtypeStruct((len(group_sizes), depth, width), dtype)
    if 0 in (num_rows, *out.shape):
        return jnp.zeros(out.shape, dtype)
    memory = [
        tiled((STAGES, TEAM, STEP, SLAB), lhs.dtype),
        tiled((STAGES, STEP, COLUMNS), g.dtype),
        tiled((TEAM, STORES, SLAB, LINE // dtype.itemsize), dtype),
        plgpu.Barrier(num_arrivals=1 + TEAM, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=TEAM, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=TEAM),
    ]
    semantics = plgpu.LoweringSemantics.Warpgroup
    run = kernel("grouped_matmul_weight_gradient", _gradient, out, memory, semantics, blocks, interpret)
    return dispatch.varying(run(*by_size(group_sizes, num_rows), lhs, g), lhs, g, group_sizes)


class _GradientTile(NamedTuple):
    group: jax.Array
    start: jax.Array
    end: jax.Array
    at: jax.Array  # row of the first block, a multiple of 8 at or before the start
    row: jax.Array
    column: jax.Array
    steps: jax.Array


def _gradient(group, start, end, total, lhs, g, out, lhs_tiles, g_tiles, out_tiles, full, empty, masked):
    me, ring = jax.lax.axis_index("warpgroup"), Ring(full, empty)
    groups, blocks = out.shape[0], jax.lax.axis_size("block")
    rows, columns = pl.cdiv(out.shape[1], TEAM * SLAB), pl.cdiv(out.shape[2], COLUMNS)

    def find(index):
        nth = jnp.minimum(div(index, rows * columns), groups - 1)
        at = div(start[nth], 8) * 8
        steps = jnp.where(end[nth] > start[nth], div(end[nth] - at + STEP - 1, STEP), 0)
        where = place(rem(index, rows * columns), rows, columns)
        return _GradientTile(group[nth], start[nth], end[nth], at, *where, steps), index + blocks

    def load(tile, step):
        def fetch(k, slot):
            block = pl.ds(pl.multiple_of(tile.at + k * STEP, 8), STEP)
            plgpu.copy_gmem_to_smem(
                g.at[block, pl.ds(tile.column * COLUMNS, COLUMNS)], g_tiles.at[slot], full.at[slot]
            )
            for i in range(TEAM):
                slab = lhs.at[block, pl.ds((tile.row * TEAM + i) * SLAB, SLAB)]
                plgpu.copy_gmem_to_smem(slab, lhs_tiles.at[slot, i], full.at[slot])

        return ring.fill(tile.steps, step, fetch)

    def multiply(tile, step):
        def operands(k, slot):
            low, high = tile.start - tile.at - k * STEP, tile.end - tile.at - k * STEP

            def keep(ref):
                row = plgpu.broadcasted_iota(jnp.int32, (STEP, SLAB), 0, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where((row >= low) & (row < high), ref[...], jnp.zeros((), ref.dtype))

            @pl.when((low > 0) | (high < STEP))
            def _():
                keep(lhs_tiles.at[slot, me])
                plgpu.commit_smem()

            @pl.when((high < STEP) & (tile.at + (k + 1) * STEP > total[0]))  # there may be NaN beyond all groups
            def _():
                for i in range(COLUMNS // TEAM // SLAB):
                    keep(g_tiles.at[slot, :, pl.ds((me * (COLUMNS // TEAM // SLAB) + i) * SLAB, SLAB)])
                plgpu.commit_smem()
                plgpu.barrier_arrive(masked)
                plgpu.barrier_wait(masked)

            return lhs_tiles.at[slot, me].transpose((1, 0)), g_tiles.at[slot]

        def store(slot, at):
            slab = pl.ds((tile.row * TEAM + me) * SLAB, SLAB)
            to = out.at[tile.group, slab, pl.ds(tile.column * COLUMNS + at, out_tiles.shape[-1])]
            plgpu.copy_smem_to_gmem(out_tiles.at[me, slot], to, commit_group=False)

        store_slabs(lambda slab: slab, ring.multiply(tile.steps, step, operands), out_tiles.at[me], store)
        return step + tile.steps

    block = jax.lax.axis_index("block")
    count = div(groups * rows * columns - block + blocks - 1, blocks)
    work(ring, count, block, find, load, multiply)


def refusal(lhs: jax.Array, other: jax.Array, dtype: jnp.dtype) -> str:
    """Why lhs [M, K] and rhs [E, K, N] or [E, N, K], or lhs and g [M, N], are not for these kernels; "" if they are."""
    if lhs.dtype != other.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the operands are {lhs.dtype} and {other.dtype}, and have to be both bfloat16 or both float16"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"preferred_element_type={dtype} has to be bfloat16, float16 or float32"
    if any(size % STEP for size in (lhs.shape[1], *other.shape[1:])):
        return f"K and N of {lhs.shape} and {other.shape} have to be multiples of {STEP}"
    if other.ndim == 2 and lhs.shape[0] % 8:
        return f"M={lhs.shape[0]} has to be a multiple of 8 for the gradient of rhs"
    return ""


def is_default(dtype: jnp.dtype, lhs: jax.Array, *others: jax.Array) -> bool:
    """Whether a program that is traced now has these kernels where it is lowered for CUDA, if nobody names others."""
    fits = not any(refusal(lhs, other, dtype) for other in others)
    return fits and dispatch.on_hopper() is True and dispatch.on_one_device()


def _check(op: str, dtype: jnp.dtype, lhs: jax.Array, *others: jax.Array) -> None:
    reason = next(filter(None, (refusal(lhs, other, dtype) for other in others)), "")
    if dispatch.on_hopper() is False:
        reason = f"the device is {dispatch.gpu().device_kind}, and has to be of compute capability 9.x, as H100 and H200 are"
    if reason:
        raise ValueError(f'{op}: implementation="pallas_hopper": {reason}; pass implementation=None')
