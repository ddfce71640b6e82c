"""Kernels for a Hopper GPU (Mosaic GPU): the statistics in one pass over the vocabulary, and a block's cotangent.

Tiles of both operands stream through shared memory (TMA) into the tensor cores (wgmma); no logits leave the registers.
Of a block's three warpgroups one issues the copies and two hold a product of ROWS rows and COLUMNS columns each, the
same columns. Two blocks make a cluster: other rows, the same columns, of which each copies half for both.

The backward pass computes the logits again, a block of the vocabulary at a time, and writes the cotangent of the block in
the operands' type; XLA's products do the rest.

On one H200 at N=16384 D=2048 V=151936 in bf16, one run, where the product alone took 14.8 ms: the statistics 15.2 ms, the
cotangents of all blocks 14.7 ms, forward and backward 62.5 ms with 1.0 GB of temporary memory. That is four products, 59 ms;
autodiff of full logits makes three, in 54.1 ms with 19.9 GB. Cotangents without clusters take 3% longer, statistics by 64
columns at a time 2%; a warpgroup that starts three steps after the other (as in the 62.5 ms) changes neither by 1%.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.entropy_covariance import chunked_xla, rows
from kernels.entropy_covariance.logits import Head, gradients

ROWS, COLUMNS = 64, 256  # of a warpgroup's product: 128 registers a thread
DEPTH = 64  # contracted in a step: a line of 128 bytes
WARPGROUPS, BLOCKS = 2, 2  # that compute in a block of threads; of a cluster
UNIT = ROWS * WARPGROUPS * BLOCKS  # rows of a cluster
STAGES = 4  # steps in flight; one less where the memory of one is what a cotangent leaves through
MULTIPROCESSORS = 132  # of an H100 SXM or H200; with fewer, some clusters wait for others to end
GROUP = 16  # units of rows that pass over the vocabulary together: they stay in the L2 cache
MAX_SPLITS = 64
BLOCK_BYTES = 2**29  # of the cotangent of a block of the vocabulary
TRANSFORMS = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
LOG2E = math.log2(math.e)
NOTHING = (-jnp.inf, -1.0, 0.0, 0.0)  # rows.Partial of no column


def unfit(hidden: jax.Array, unembedding: jax.Array, row_shards: int, vocab_shards: int) -> str:
    """What keeps the kernels from serving these arguments, and what to do; empty when nothing does."""
    operands = jnp.result_type(hidden, unembedding)
    depth, vocab = unembedding.shape
    if row_shards > 1 or vocab_shards > 1:
        return (
            f"takes operands of one device, not row_shards={row_shards}, vocab_shards={vocab_shards}; "
            'use "chunked_xla", or call it in shard_map'
        )
    if operands not in (jnp.bfloat16, jnp.float16):
        return f'takes bf16 or fp16 operands, not {operands}; use "chunked_xla"'
    if depth % DEPTH or vocab % DEPTH:
        return (
            f"copies multiples of {DEPTH}, not unembedding [D={depth}, V={vocab}]; pad the vocabulary and name the real "
            'number as vocab_size, or use "chunked_xla"'
        )
    return ""


def token_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    head: Head,
    row_shards: int,
    vocab_shards: int,
    *,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there.

    Raises:
        ValueError: see :func:`unfit`.
    """
    if why := unfit(hidden, unembedding, row_shards, vocab_shards):
        raise ValueError(f'token_statistics: implementation="pallas_hopper" {why}')
    static = head.soft_cap, head.vocab_size, interpret
    return _statistics(static, hidden, unembedding, targets, head.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    vocab_size = static[1]
    walk = Walk.over(hidden.shape[0], vocab_size)
    parts = _partials(walk, static, hidden, unembedding, targets, temperature)
    parts = tuple(dispatch.varying(x, hidden, unembedding, targets) for x in parts[:, :, : hidden.shape[0]])
    both = lambda a, b: tuple(rows.merge(rows.Partial(*a), rows.Partial(*b)))
    total = rows.Partial(*lax.reduce(parts, tuple(jnp.float32(x) for x in NOTHING), both, (0,)))
    padding = (targets >= vocab_size) & (targets < unembedding.shape[1])
    return rows.finish(total._replace(target=jnp.where(padding, -jnp.inf, total.target)))


def _forward(static, hidden, unembedding, targets, temperature):
    out = _statistics(static, hidden, unembedding, targets, temperature)
    return out, (hidden, unembedding, targets, temperature, out)


def _backward(static, residuals, g):
    hidden, unembedding, targets, temperature, (_, entropy, logsumexp) = residuals
    depth, vocab = unembedding.shape
    g_logprob, g_entropy, g_logsumexp = (x / temperature.astype(x.dtype) for x in g)
    # rows.cotangent in bits: p (constant + linear * log2 p), and more for the target.
    constant, linear = g_logsumexp - g_logprob - g_entropy * entropy, -g_entropy / LOG2E
    row_values = jnp.stack([logsumexp * LOG2E, constant, linear, g_logprob])

    def body(start, width, carry):
        d_hidden, d_weight = carry
        weight = lax.dynamic_slice_in_dim(unembedding, start, width, axis=1)
        d_raw = _cotangent(static, hidden, weight, targets - start, row_values, temperature, start)
        more, d_block = gradients(hidden, weight, d_raw)
        d_weight = lax.dynamic_update_slice_in_dim(d_weight, d_block.astype(unembedding.dtype), start, axis=1)
        return d_hidden + more, d_weight

    init = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros((depth, vocab), unembedding.dtype)
    init = tuple(dispatch.varying(x, hidden, unembedding, targets) for x in init)
    width = block_width(hidden.shape[0], vocab)
    d_hidden, d_weight = chunked_xla.each_block(vocab, width, body, init)
    return d_hidden.astype(hidden.dtype), d_weight, None, None


_statistics.defvjp(_forward, _backward)


def block_width(num_rows: int, vocab: int) -> int:
    """Columns of equal blocks whose cotangents take at most BLOCK_BYTES, multiples of COLUMNS if several."""
    most = max(BLOCK_BYTES // (2 * num_rows * COLUMNS), 1)
    num_blocks = pl.cdiv(pl.cdiv(vocab, COLUMNS), most)
    return vocab if num_blocks == 1 else pl.cdiv(vocab, num_blocks * COLUMNS) * COLUMNS


class Walk(NamedTuple):
    """The way of a grid of clusters over units of rows and splits of the vocabulary: runs of tiles of COLUMNS columns."""

    units: int
    tiles: int
    splits: int
    run: int  # tiles of a split; the last may have fewer
    clusters: int

    @classmethod
    def over(cls, num_rows: int, num_columns: int, run: int | None = None) -> "Walk":
        """Runs of ``run`` tiles; None for the fewest splits with which the busiest cluster has the least to do."""
        units, tiles = pl.cdiv(num_rows, UNIT), pl.cdiv(num_columns, COLUMNS)
        clusters = MULTIPROCESSORS // BLOCKS
        busiest = lambda splits: pl.cdiv(units * splits, clusters) * pl.cdiv(tiles, splits)
        run = run or pl.cdiv(tiles, min(range(1, min(tiles, MAX_SPLITS) + 1), key=busiest))
        splits = pl.cdiv(tiles, run)
        return cls(units, tiles, splits, run, min(clusters, units * splits))

    def place(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(unit, split) of the i-th visit: the units of a group go over the splits together."""
        group, i = lax.div(i, GROUP * self.splits), lax.rem(i, GROUP * self.splits)
        units = jnp.minimum(GROUP, self.units - group * GROUP)
        return group * GROUP + lax.rem(i, units), lax.div(i, units)


def _partials(walk, static, hidden, unembedding, targets, temperature):
    """Fields of ``rows.Partial`` [4, splits, N], N up to a multiple of UNIT."""
    soft_cap, vocab_size, interpret = static

    def visit(place, step, product, target_ref, temperature_ref, out_ref, target_smem, out_smem, arrived):
        row, split, first, num_tiles = place
        plgpu.copy_gmem_to_smem(target_ref.at[row], target_smem, arrived)
        plgpu.barrier_wait(arrived)
        target, temperature = target_smem[...], temperature_ref[0]
        temper, bits = rows.tempering(temperature, soft_cap), LOG2E / temperature

        def tile(j, carry):
            step, total = carry
            raw, step = product(step)
            start = (first + j) * COLUMNS
            column = lax.broadcasted_iota(jnp.int32, raw.shape, 1)
            if vocab_size % COLUMNS:
                raw = jnp.where(column < vocab_size - start, raw, -jnp.inf)
            highest = jnp.max(raw, axis=1)
            base = jnp.where(highest > -jnp.inf, highest, 0)
            shifted = rows.capped(raw, soft_cap) - _spread(rows.capped(base, soft_cap))
            shifted = jnp.maximum(shifted * bits, rows.IMPOSSIBLE)
            is_top = raw == _spread(highest)
            e = jnp.where(is_top, 0, jnp.exp2(shifted))
            num_top = jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1)
            here = rows.Partial(
                m=temper(highest),
                r=jnp.sum(e, axis=1) + (jnp.where(highest > -jnp.inf, num_top, 0) - 1),
                t=jnp.sum(e * shifted, axis=1) / LOG2E,
                target=temper(jnp.sum(jnp.where(column == _spread(target - start), raw, 0), axis=1)),
            )
            return step, rows.merge(total, here)

        nothing = rows.Partial(*(jnp.full((ROWS,), x, jnp.float32) for x in NOTHING))
        step, total = lax.fori_loop(0, num_tiles, tile, (step, nothing))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, x in enumerate(total):
            out_smem[i] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[:, split, row])
        return step

    return _stream(
        visit,
        walk,
        hidden,
        unembedding,
        (_whole_units(targets), temperature.astype(jnp.float32).reshape(1)),
        out_type=jax.ShapeDtypeStruct((len(NOTHING), walk.splits, walk.units * UNIT), jnp.float32),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, len(NOTHING), ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ),
        stages=STAGES,
        approximate=soft_cap is None,
        name="token_statistics",
        interpret=interpret,
    )


def _cotangent(static, hidden, weight, targets, row_values, temperature, start):
    """Cotangent of hidden @ weight [N, width], columns ``start`` to ``start + width`` of the vocabulary."""
    soft_cap, vocab_size, interpret = static
    num_rows, width = hidden.shape[0], weight.shape[1]
    whole_rows = num_rows + -num_rows % 8

    def visit(place, step, product, target_ref, value_ref, temperature_ref, limit_ref, out_ref, *own):
        target_smem, value_smem, out_smem, arrived = own
        row, _, first, _ = place
        plgpu.copy_gmem_to_smem(target_ref.at[row], target_smem, arrived)
        plgpu.copy_gmem_to_smem(value_ref.at[:, row], value_smem, arrived)
        plgpu.barrier_wait(arrived)
        logsumexp, constant, linear, more = (_spread(value_smem[i]) for i in range(4))
        raw, step = product(step)
        capped = rows.capped(raw, soft_cap)
        logp = jnp.maximum(capped * (LOG2E / temperature_ref[0]) - logsumexp, rows.IMPOSSIBLE)
        column = first * COLUMNS + lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        dz = jnp.exp2(logp) * (constant + linear * logp) + jnp.where(column == _spread(target_smem[...]), more, 0)
        if soft_cap is not None:
            dz *= 1 - (jnp.maximum(capped, -soft_cap) / soft_cap) ** 2
        dz = jnp.where(column < limit_ref[0], dz, 0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = dz.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, pl.ds(first * COLUMNS, COLUMNS)])
        return step

    out = _stream(
        visit,
        Walk.over(num_rows, width, run=1),
        hidden,
        weight,
        (
            _whole_units(targets),
            _whole_units(row_values),
            temperature.astype(jnp.float32).reshape(1),
            jnp.int32(vocab_size - start).reshape(1),
        ),
        out_type=jax.ShapeDtypeStruct((whole_rows, width), hidden.dtype),
        scratch=(
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, len(row_values), ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS, COLUMNS), hidden.dtype, transforms=TRANSFORMS),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
        ),
        stages=STAGES - 1,
        approximate=soft_cap is None,
        name="token_statistics_gradient",
        interpret=interpret,
    )
    return out[:num_rows]


def _spread(x: jax.Array) -> jax.Array:
    """[ROWS] over columns."""
    return lax.broadcast_in_dim(x, (ROWS, COLUMNS), (0,))


def _whole_units(x: jax.Array) -> jax.Array:
    """Zeros after the last axis, up to a multiple of UNIT."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % UNIT)])


def _stream(visit, walk, hidden, weight, operands, *, out_type, scratch, stages, approximate, name, interpret):
    """A kernel that calls ``visit(place, step, product, *operands, out, *own scratch) -> step`` along ``walk``.

    ``visit`` runs in each warpgroup that computes, for its ROWS rows, and calls ``product(step) -> (raw, step)`` once
    for each tile of ``place``: (its rows, split, first tile, number of tiles). Scratch leads with an axis of warpgroups.
    """
    steps_a_tile = hidden.shape[1] // DEPTH
    height = ROWS * WARPGROUPS
    hidden = jnp.pad(hidden, ((0, -hidden.shape[0] % 8), (0, 0)))  # what is copied is tiled by 8 rows

    def kernel(hidden_ref, weight_ref, *refs):
        given, (x_smem, w_smem, full, empty, *own) = refs[: len(operands) + 1], refs[len(operands) + 1 :]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        num_visits = lax.div(walk.units * walk.splits - 1 - cluster, walk.clusters) + 1

        def visited(i):
            unit, split = walk.place(cluster + i * walk.clusters)
            row, first = unit * UNIT + lax.axis_index("block") * height, split * walk.run
            return row, split, first, jnp.minimum(walk.run, walk.tiles - first)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def load(row, tile, depth, step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                deep, wide = pl.ds(depth * DEPTH, DEPTH), pl.ds(tile * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(hidden_ref.at[pl.ds(row, height), deep], x_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    weight_ref.at[deep, wide], w_smem.at[slot], full.at[slot], collective_axes="block"
                )
                return step + 1

            def follow(i, step):
                row, _, first, num_tiles = visited(i)
                tile = lambda j, step: lax.fori_loop(
                    0, steps_a_tile, lambda depth, step: load(row, first + j, depth, step), step
                )
                return lax.fori_loop(0, num_tiles, tile, step)

            num_steps = lax.fori_loop(0, num_visits, follow, jnp.int32(0))

            # The other block may still copy into this one's memory: leave when all has been used.
            @pl.loop(lax.max(num_steps - stages, 0), num_steps)
            def _(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def product(step):
                def accumulate(acc):
                    def deepen(depth, step):
                        slot = lax.rem(step, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_smem.at[slot])
                        plgpu.wgmma_wait(1)  # the step before has read its slot

                        @pl.when(depth > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(step - 1, stages)])

                        return step + 1

                    end = lax.fori_loop(0, steps_a_tile, deepen, step)
                    return acc[...], end

                raw, step = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
                plgpu.barrier_arrive(empty.at[lax.rem(step - 1, stages)])
                return raw, step

            def follow(i, step):
                row, split, first, num_tiles = visited(i)
                place = pl.ds(row + warpgroup * ROWS, ROWS), split, first, num_tiles
                return visit(place, step, product, *given, *(ref.at[warpgroup] for ref in own))

            lax.fori_loop(0, num_visits, follow, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(walk.clusters,),
        grid_names=("cluster",),
        cluster=(BLOCKS,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((stages, height, DEPTH), hidden.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((stages, DEPTH, COLUMNS), hidden.dtype, transforms=TRANSFORMS),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),  # one for each copy
            plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=stages, num_arrivals=WARPGROUPS),
            *scratch,
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
        kernel_name=name,
    )
    with jax.enable_x64(False):  # indices are of 32 bits
        return call(hidden, weight, *operands)
