"""Tiles of ``hidden @ unembedding`` on a Hopper GPU, streamed through shared memory (TMA) into the tensor cores (wgmma).

Of a block's three warpgroups one issues the copies and two hold a product of ROWS rows and COLUMNS columns each, the
same columns. Two blocks make a cluster: other rows, the same columns, of which each copies half for both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, COLUMNS = 64, 256  # of a warpgroup's product: 128 registers a thread
DEPTH = 64  # contracted in a step: a line of 128 bytes
WARPGROUPS, BLOCKS = 2, 2  # that compute in a block of threads; of a cluster
UNIT = ROWS * WARPGROUPS * BLOCKS  # rows of a cluster
STAGES = 4  # steps in flight; one less where the memory of one is what a tile leaves through
MULTIPROCESSORS = 132  # of an H100 SXM or H200; with fewer, some clusters wait for others to end
GROUP = 16  # units of rows that pass over the vocabulary together: they stay in the L2 cache
MAX_SPLITS = 64
TRANSFORMS = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))


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


def stream(
    visit, walk, hidden, unembedding, start, operands, *, out_type, scratch, stages, approximate, name, interpret
):
    """A kernel that calls ``visit(place, step, product, *operands, *outs, *own scratch) -> step`` along ``walk``.

    ``visit`` runs in each warpgroup that computes, for its ROWS rows, and calls ``product(step) -> (raw, step)`` once
    for each tile of ``place``: (its rows, split, first tile, number of tiles). Tiles count from column ``start``, a
    multiple of COLUMNS. Scratch leads with an axis of warpgroups.
    """
    steps_a_tile = hidden.shape[1] // DEPTH
    height = ROWS * WARPGROUPS
    hidden = jnp.pad(hidden, ((0, whole_lines(len(hidden)) - len(hidden)), (0, 0)))

    def kernel(hidden_ref, weight_ref, start_ref, *refs):
        num_given = len(operands) + len(out_type)
        given, (x_smem, w_smem, full, empty, *own) = refs[:num_given], refs[num_given:]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        start_tile = lax.div(start_ref[0], COLUMNS)
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
                    0, steps_a_tile, lambda depth, step: load(row, start_tile + first + j, depth, step), step
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
        return call(hidden, unembedding, jnp.asarray(start, jnp.int32).reshape(1), *operands)


def whole_lines(num_rows: int) -> int:
    """Up to a multiple of 8: what is copied is tiled by 8 rows."""
    return num_rows + -num_rows % 8
