"""Kernels for a Hopper GPU (Mosaic GPU): the statistics in one pass over the vocabulary, and a block's cotangent.

No logits leave the registers of a forward pass that nobody differentiates. A backward pass goes over blocks of the
vocabulary, and the cotangent of each, in the operands' type, is what it needs memory for. Logits of the first block wait
there from the forward pass on: 16 bits, less the highest of their row in a tile, so that those that matter keep their
digits, and that one all of them. Those of other blocks a kernel computes again. XLA's products do the rest.

On one H200 at N=16384 D=2048 V=151936 in bf16, one run, where the product alone took 14.7 ms: the statistics 15.6 ms,
forward and backward 60.1 ms with 1.4 GB of temporary memory, a fifth of the logits being kept. That is 3.8 products, 56 ms;
``reference``, which keeps all logits in fp32 and makes three, takes 53.2 ms with 14.9 GB. Blocks of half the size take
62.9 ms with 0.9 GB. In one block the kernel is the faster of the two, with two thirds of the memory: 51.8 ms with 10.0 GB,
and 6.5 ms for 7.0 where N is 2048. Cotangents without clusters take 3% longer, statistics by 64 columns at a time 2%; a
warpgroup that starts three steps after the other changes neither by 1%.
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
from kernels.entropy_covariance.hopper_stream import (
    COLUMNS,
    DEPTH,
    ROWS,
    STAGES,
    TRANSFORMS,
    UNIT,
    WARPGROUPS,
    Walk,
    stream,
    whole_lines,
)
from kernels.entropy_covariance.logits import Head, gradients

BLOCK_BYTES = 2**30  # of a block's cotangent, or its logits
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
    static = _Static(head.soft_cap, head.vocab_size, interpret)
    return _statistics(static, hidden, unembedding, targets, head.temperature)


class _Static(NamedTuple):
    soft_cap: float | None
    vocab_size: int
    interpret: object


class Kept(NamedTuple):
    """Logits of the first ``C`` columns, before temperature and cap."""

    below: jax.Array  # [N, C] in fp16, less the highest of the row in the tile
    highest: jax.Array  # [tiles, N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    parts, _ = _partials(static, 0, static.vocab_size, False, hidden, unembedding, targets, temperature)
    return _finish(static, parts, hidden, unembedding, targets)


def _forward(static, hidden, unembedding, targets, temperature):
    operands = hidden, unembedding, targets, temperature
    width = block_width(hidden.shape[0], unembedding.shape[1])
    parts, kept = _partials(static, 0, width, True, *operands)
    if width < static.vocab_size:
        others, _ = _partials(static, width, static.vocab_size, False, *operands)
        parts = jnp.concatenate([parts, others], axis=1)
    out = _finish(static, parts, hidden, unembedding, targets)
    return out, (*operands, out, kept)


def _finish(static, parts, hidden, unembedding, targets):
    parts = tuple(dispatch.varying(x, hidden, unembedding, targets) for x in parts[:, :, : hidden.shape[0]])
    both = lambda a, b: tuple(rows.merge(rows.Partial(*a), rows.Partial(*b)))
    total = rows.Partial(*lax.reduce(parts, tuple(jnp.float32(x) for x in NOTHING), both, (0,)))
    padding = (targets >= static.vocab_size) & (targets < unembedding.shape[1])
    return rows.finish(total._replace(target=jnp.where(padding, -jnp.inf, total.target)))


def _backward(static, residuals, g):
    hidden, unembedding, targets, temperature, (_, entropy, logsumexp), kept = residuals
    num_rows, vocab = hidden.shape[0], unembedding.shape[1]
    g_logprob, g_entropy, g_logsumexp = (x / temperature.astype(x.dtype) for x in g)
    # rows.cotangent in bits: p (constant + linear * log2 p), and more for the target.
    constant, linear = g_logsumexp - g_logprob - g_entropy * entropy, -g_entropy / LOG2E
    row_values = jnp.stack([logsumexp * LOG2E, constant, linear, g_logprob])

    def products(start, width, cotangent):
        weight = lax.dynamic_slice_in_dim(unembedding, start, width, axis=1)
        return gradients(hidden, weight, cotangent, unembedding.dtype)

    def add(start, width, carry):
        start, (d_hidden, d_weight) = start + first, carry
        cotangent = _cotangent(static, start, width, hidden, unembedding, targets, row_values, temperature)
        more, d_block = products(start, width, cotangent)
        return d_hidden + more, lax.dynamic_update_slice_in_dim(d_weight, d_block, start, axis=1)

    first = block_width(num_rows, vocab)
    # A block that is all is small: 5% faster at once than in a loop, for as much memory again.
    cotangent = _of_kept(static, kept, targets, row_values, temperature, hidden.dtype, at_once=first == vocab)
    d_hidden, d_weight = products(0, first, cotangent)
    if first < vocab:
        d_weight = jnp.pad(d_weight, ((0, 0), (0, vocab - first)))
        d_hidden, d_weight = chunked_xla.each_block(vocab - first, first, add, (d_hidden, d_weight))
    return d_hidden.astype(hidden.dtype), d_weight, None, None


_statistics.defvjp(_forward, _backward)


def _of_kept(static, kept, targets, row_values, temperature, dtype, at_once):
    """Cotangent of kept logits: at once, or in their memory, by a loop over rows that overwrites what it carries."""

    def overwrite(start, size, memory):
        of = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)
        below = lax.bitcast_convert_type(of(memory, 0), jnp.float16).astype(jnp.float32)
        highest = jnp.repeat(of(kept.highest, 1).T, COLUMNS, axis=1)
        raw = below + highest[:, : below.shape[1]]
        column = lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        limits = temperature.astype(jnp.float32), static.soft_cap, static.vocab_size
        dz = _of_logits(raw, column, of(targets, 0)[:, None], of(row_values, 1)[..., None], *limits)
        dz = lax.bitcast_convert_type(dz.astype(dtype), memory.dtype)
        return lax.dynamic_update_slice_in_dim(memory, dz, start, 0)

    num_rows, memory = len(targets), lax.bitcast_convert_type(kept.below, jnp.uint16)
    memory = chunked_xla.each_block(num_rows, num_rows if at_once else max(num_rows // 4, 1), overwrite, memory)
    return lax.bitcast_convert_type(memory, dtype)


def _of_logits(raw, column, target, row_values, temperature, soft_cap, limit):
    """Cotangent of raw logits of these columns; what a row has one of is spread over the columns, or can be."""
    logsumexp, constant, linear, more = row_values
    capped = rows.capped(raw, soft_cap)
    logp = jnp.maximum(capped * (LOG2E / temperature) - logsumexp, rows.IMPOSSIBLE)
    dz = jnp.exp2(logp) * (constant + linear * logp) + jnp.where(column == target, more, 0)
    if soft_cap is not None:
        dz *= 1 - (jnp.maximum(capped, -soft_cap) / soft_cap) ** 2
    return jnp.where(column < limit, dz, 0)


def block_width(num_rows: int, vocab: int) -> int:
    """Columns of equal blocks whose cotangents take at most BLOCK_BYTES, multiples of COLUMNS if several."""
    most = max(BLOCK_BYTES // (2 * num_rows * COLUMNS), 1)
    num_blocks = pl.cdiv(pl.cdiv(vocab, COLUMNS), most)
    return vocab if num_blocks == 1 else pl.cdiv(vocab, num_blocks * COLUMNS) * COLUMNS


def _partials(static, start, stop, keep, hidden, unembedding, targets, temperature):
    """Of columns from ``start`` to ``stop``: fields of ``rows.Partial`` [4, splits, N], N up to a multiple of UNIT, and the
    logits if they are to be kept."""
    soft_cap, vocab_size, interpret = static
    num_rows, real = hidden.shape[0], min(stop, vocab_size) - start
    walk = Walk.over(num_rows, stop - start)

    def visit(place, step, product, target_ref, temperature_ref, out_ref, *refs):
        kept_refs, (target_smem, out_smem, arrived, *kept_smem) = refs[: 2 * keep], refs[2 * keep :]
        row, split, first, num_tiles = place
        plgpu.copy_gmem_to_smem(target_ref.at[row], target_smem, arrived)
        plgpu.barrier_wait(arrived)
        target, temperature = target_smem[...], temperature_ref[0]
        temper, bits = rows.tempering(temperature, soft_cap), LOG2E / temperature

        def tile(j, carry):
            step, total = carry
            raw, step = product(step)
            left = (first + j) * COLUMNS  # of the tile
            column = lax.broadcasted_iota(jnp.int32, raw.shape, 1)
            if real < walk.tiles * COLUMNS:
                raw = jnp.where(column < real - left, raw, -jnp.inf)
            highest = jnp.max(raw, axis=1)
            base = jnp.where(highest > -jnp.inf, highest, 0)
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for smem, x in zip(kept_smem, (raw - _spread(base), base), strict=True):
                    smem[...] = x.astype(smem.dtype)
                plgpu.commit_smem()
                at = (row, pl.ds(left, COLUMNS)), (first + j, row)
                for smem, ref, where in zip(kept_smem, kept_refs, at, strict=True):
                    plgpu.copy_smem_to_gmem(smem, ref.at[where])
            shifted = rows.capped(raw, soft_cap) - _spread(rows.capped(base, soft_cap))
            shifted = jnp.maximum(shifted * bits, rows.IMPOSSIBLE)
            is_top = raw == _spread(highest)
            e = jnp.where(is_top, 0, jnp.exp2(shifted))
            num_top = jnp.sum(jnp.where(is_top, 1.0, 0.0), axis=1)
            here = rows.Partial(
                m=temper(highest),
                r=jnp.sum(e, axis=1) + (jnp.where(highest > -jnp.inf, num_top, 0) - 1),
                t=jnp.sum(e * shifted, axis=1) / LOG2E,
                target=temper(jnp.sum(jnp.where(column == _spread(target - left), raw, 0), axis=1)),
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

    outs = [((len(NOTHING), walk.splits, walk.units * UNIT), jnp.float32)]
    scratch = [
        plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
        plgpu.SMEM((WARPGROUPS, len(NOTHING), ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=WARPGROUPS),
    ]
    if keep:
        outs += [
            ((whole_lines(num_rows), stop - start), jnp.float16),
            ((walk.tiles, walk.units * UNIT), jnp.float32),
        ]
        scratch += [
            plgpu.SMEM((WARPGROUPS, ROWS, COLUMNS), jnp.float16, transforms=TRANSFORMS),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        ]
    parts, *kept = stream(
        visit,
        walk,
        hidden,
        unembedding,
        start,
        (_whole_units(targets - start), temperature.astype(jnp.float32).reshape(1)),
        out_type=[jax.ShapeDtypeStruct(*out) for out in outs],
        scratch=scratch,
        stages=STAGES - keep,
        approximate=soft_cap is None,
        name="token_statistics",
        interpret=interpret,
    )
    if not keep:
        return parts, None
    below, highest = (dispatch.varying(x, hidden, unembedding, targets) for x in kept)
    return parts, Kept(below[:num_rows], highest[:, :num_rows])


def _cotangent(static, start, width, hidden, unembedding, targets, row_values, temperature):
    """Cotangent of the logits [N, width] of columns from ``start`` on."""
    soft_cap, vocab_size, interpret = static
    num_rows = hidden.shape[0]

    def visit(place, step, product, target_ref, value_ref, temperature_ref, limit_ref, out_ref, *own):
        target_smem, value_smem, out_smem, arrived = own
        row, _, first, _ = place
        plgpu.copy_gmem_to_smem(target_ref.at[row], target_smem, arrived)
        plgpu.copy_gmem_to_smem(value_ref.at[:, row], value_smem, arrived)
        plgpu.barrier_wait(arrived)
        values = [_spread(value_smem[i]) for i in range(len(row_values))]
        raw, step = product(step)
        column = first * COLUMNS + lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        limits = temperature_ref[0], soft_cap, limit_ref[0]
        dz = _of_logits(raw, column, _spread(target_smem[...]), values, *limits)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = dz.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, pl.ds(first * COLUMNS, COLUMNS)])
        return step

    (out,) = stream(
        visit,
        Walk.over(num_rows, width, run=1),
        hidden,
        unembedding,
        start,
        (
            _whole_units(targets - start),
            _whole_units(row_values),
            temperature.astype(jnp.float32).reshape(1),
            jnp.int32(vocab_size - start).reshape(1),
        ),
        out_type=[jax.ShapeDtypeStruct((whole_lines(num_rows), width), hidden.dtype)],
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
