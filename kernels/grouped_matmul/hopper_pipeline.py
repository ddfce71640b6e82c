"""How the Hopper kernels of ``grouped_matmul`` keep a multiprocessor busy: one warpgroup loads, others multiply and store.

Stages of shared memory go round between them, and tiles are looked up before they are worked on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch
from kernels.grouped_matmul.hopper_tiles import SLAB, TEAM
from kernels.integers import rem

COLUMNS = 256  # of a tile: 128 registers of a thread
STAGES = 4  # steps in shared memory
STORES = 2  # pieces of a slab on their way to memory
LINE = 128  # bytes of a row in shared memory: the widest swizzle


class Ring(NamedTuple):
    """Stages of shared memory between the warpgroup that loads and those that multiply; steps are counted over all tiles."""

    full: Any  # barriers [STAGES]: loaded
    empty: Any  # multiplied by all

    def fill(self, steps: jax.Array, step: jax.Array, fetch: Callable) -> jax.Array:
        """``fetch(k, slot)`` for each of a tile's steps, once the slot is free."""

        def body(k, step):
            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(self.empty.at[rem(step, STAGES)])

            fetch(k, rem(step, STAGES))
            return step + 1

        return jax.lax.fori_loop(0, steps, body, step)

    def drain(self, step: jax.Array) -> None:
        """Waits for those that multiply."""

        @pl.loop(jnp.maximum(step - STAGES, 0), step)
        def _(step):
            plgpu.barrier_wait(self.empty.at[rem(step, STAGES)])

    def multiply(self, steps: jax.Array, step: jax.Array, operands: Callable, products: int = 1) -> list[jax.Array]:
        """So many of [SLAB, COLUMNS / products] in fp32: the first of ``operands(k, slot)`` times each of the others, summed
        over a tile's steps, one behind the one before."""

        def scope(*totals):
            def body(k, step):
                plgpu.barrier_wait(self.full.at[rem(step, STAGES)])
                lhs, *others = operands(k, rem(step, STAGES))
                for total, rhs in zip(totals, others, strict=True):
                    plgpu.wgmma(total, lhs, rhs)
                plgpu.wgmma_wait(products)
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.empty.at[rem(step - 1, STAGES)]))
                return step + 1

            done = jax.lax.fori_loop(0, steps, body, step)
            results = [total[...] for total in totals]
            pl.when(steps > 0)(lambda: plgpu.barrier_arrive(self.empty.at[rem(done - 1, STAGES)]))
            return results

        return pl.run_scoped(scope, *[plgpu.ACC((SLAB, COLUMNS // products), jnp.float32)] * products)

    def skip(self, steps: jax.Array, step: jax.Array) -> None:
        """Lets a tile's steps pass."""

        @pl.loop(0, steps)
        def _(k):
            plgpu.barrier_wait(self.full.at[rem(step + k, STAGES)])
            plgpu.barrier_arrive(self.empty.at[rem(step + k, STAGES)])


def work(ring: Ring, count: jax.Array, cursors: Any, find: Callable, load: Callable, multiply: Callable) -> None:
    """``count`` tiles, ``tile, cursors = find(cursors)``: ``step = load(tile, step)`` in one warpgroup, ``multiply`` in the
    others. A tile is looked up before the one before it is worked on, which hides how long that takes."""
    me = jax.lax.axis_index("warpgroup")

    def each_tile(run):
        def body(_, carry):
            step, tile, cursors = carry
            following = find(cursors)
            return run(tile, step), *following

        return jax.lax.fori_loop(0, count, body, (jnp.int32(0), *find(cursors)))[0]

    @pl.when(me == TEAM)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        ring.drain(each_tile(load))

    @pl.when(me < TEAM)
    def _():
        plgpu.set_max_registers(232, action="increase")
        each_tile(multiply)
        plgpu.wait_smem_to_gmem(0)


def store_slabs(join: Callable, slabs: list[jax.Array], pieces: Any, copy: Callable) -> None:
    """``join(*slabs)`` by pieces of so many columns: ``copy(slot, column)`` sends what lies in ``pieces[slot]``."""
    width = pieces.shape[-1]
    for i in range(slabs[0].shape[1] // width):
        plgpu.wait_smem_to_gmem(STORES - 1, wait_read_only=True)
        pieces[i % STORES] = join(*(slab[:, i * width : (i + 1) * width] for slab in slabs)).astype(pieces.dtype)
        plgpu.commit_smem()
        copy(i % STORES, i * width)
        plgpu.commit_smem_to_gmem_group()


def kernel(name, body, out, memory, semantics, blocks, interpret):
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=memory,
        grid=(blocks or _multiprocessors(),),
        grid_names=("block",),
        num_threads=TEAM + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=semantics, approx_math=True),
        interpret=interpret,
        kernel_name=name,
    )


def tiled(shape: tuple[int, ...], dtype: jnp.dtype):
    """Shared memory as wgmma reads it."""
    transforms = plgpu.TilingTransform((8, LINE // dtype.itemsize)), plgpu.SwizzleTransform(LINE)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def two_views(shape: tuple[int, ...], dtype: jnp.dtype, interpret: Any):
    """The same, and row by row: rows of one line lie alike in both, and only the second can be copied to or from any row.

    The interpreter knows no layouts, and would give each view a memory of its own.
    """
    rows = plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(LINE),))
    return tiled(shape, dtype) if interpret else plgpu.RefUnion(rows, tiled(shape, dtype))


def views(memory: Any, interpret: Any) -> Any:
    return (memory, memory) if interpret else memory


def _multiprocessors() -> int:
    """132, of an H100 or H200, where nothing tells."""
    device = dispatch.gpu()
    return 132 if device is None else getattr(device, "core_count", 0) or getattr(device, "num_cores", 0) or 132
