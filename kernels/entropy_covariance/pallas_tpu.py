"""A TPU kernel for the forward pass: blocks of the vocabulary stream past rows whose statistics stay on the chip.

The unembedding is read once for each block of rows, and neither logits nor anything else of the vocabulary's size is
written. The statistics are those of ``rows``, merged block by block in fp32. The backward pass is ``chunked_xla``'s: plain
XLA reaches more of a TPU's peak there than published kernels do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import dispatch
from kernels.entropy_covariance import chunked_xla, rows
from kernels.entropy_covariance.logits import Head
from kernels.tpu import VMEM_BYTES, keep


class Tiles(NamedTuple):
    """Rows, columns of the vocabulary, and contracted columns of a block."""

    rows: int
    vocab: int
    depth: int


def token_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    head: Head,
    row_shards: int,
    vocab_shards: int,
    *,
    tiles: Tiles | None = None,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there.

    Raises:
        ValueError: operands that the compiler shards, or of 64 bits: a kernel sees one device's, and fp32 at most.
    """
    operands = jnp.result_type(hidden, unembedding)
    if row_shards > 1 or vocab_shards > 1 or operands == jnp.float64:
        raise ValueError(
            'token_statistics: implementation="pallas_tpu" takes bf16 or fp32 operands of one device, not '
            f'row_shards={row_shards}, vocab_shards={vocab_shards}, {operands}; use "chunked_xla", or call it in shard_map'
        )
    tiles = tiles or choose_tiles(hidden.shape[0], hidden.shape[1], unembedding.shape[1], operands)
    static = head.soft_cap, head.vocab_size, tiles, interpret
    return _statistics(static, hidden, unembedding, targets, head.temperature)


def choose_tiles(num_rows: int, depth: int, vocab: int, dtype: jnp.dtype) -> Tiles:
    """As many rows as memory holds, since each block of them reads the whole unembedding; then columns."""
    size = jnp.dtype(dtype).itemsize
    height = min(512, -(-num_rows // 16) * 16)
    width, deep = min(512, -(-vocab // 128) * 128), min(depth, 2048)
    while depth % deep and deep > 128:
        deep -= 128 if deep % 128 == 0 else deep % 128

    # Two blocks of each operand, their product, and the temporaries of its statistics.
    used = lambda height, width, deep: 2 * size * deep * (height + width) + 6 * 4 * height * width
    while used(height, width, deep) > VMEM_BYTES and height > 128:
        height //= 2
    while used(height, width, deep) > VMEM_BYTES and width > 128:
        width //= 2
    return Tiles(height, width, deep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    soft_cap, vocab_size, t, interpret = static
    num_rows, depth = hidden.shape
    vocab = unembedding.shape[1]
    operands = jnp.result_type(hidden, unembedding)
    precision = jax.lax.Precision.HIGHEST if operands == jnp.float32 else None
    steps = pl.cdiv(vocab, t.vocab), pl.cdiv(depth, t.depth)

    def kernel(temperature_ref, hidden_ref, weight_ref, target_ref, *refs):
        logprob_ref, entropy_ref, logsumexp_ref, raw_ref, *total_refs = refs
        v, d = pl.program_id(1), pl.program_id(2)

        @pl.when((v == 0) & (d == 0))
        def _():
            zero = jnp.zeros((t.rows, 1), jnp.float32)
            for ref, start in zip(total_refs, (zero - jnp.inf, zero - 1, zero, zero), strict=True):
                ref[...] = start

        @pl.when(d == 0)
        def _():
            raw_ref[...] = jnp.zeros_like(raw_ref)

        x, w = hidden_ref[...].astype(operands), weight_ref[...].astype(operands)
        if depth % t.depth:  # what lies past the contracted axis may be anything
            inside = depth - d * t.depth
            x, w = keep(x, 1, inside), keep(w, 0, inside)
        raw_ref[...] += jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)

        @pl.when(d == steps[1] - 1)
        def _():
            column = v * t.vocab + jax.lax.broadcasted_iota(jnp.int32, (t.rows, t.vocab), 1)
            raw = jnp.where(column < vocab_size, raw_ref[...], -jnp.inf)
            temper = rows.tempering(temperature_ref[0, 0], soft_cap)
            total = rows.Partial(*(ref[...] for ref in total_refs))
            here = _partial(raw, temper, column == target_ref[...])
            for ref, new in zip(total_refs, rows.merge(total, here), strict=True):
                ref[...] = new

        @pl.when((v == steps[0] - 1) & (d == steps[1] - 1))
        def _():
            out = rows.finish(rows.Partial(*(ref[...] for ref in total_refs)))
            for ref, value in zip((logprob_ref, entropy_ref, logsumexp_ref), out, strict=True):
                ref[...] = value

    of_rows = pl.BlockSpec((t.rows, 1), lambda r, v, d: (r, 0))
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, t.rows), *steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((t.rows, t.depth), lambda r, v, d: (r, d)),
            pl.BlockSpec((t.depth, t.vocab), lambda r, v, d: (d, v)),
            of_rows,
        ],
        out_specs=[of_rows] * 3,
        out_shape=[dispatch.result((num_rows, 1), jnp.float32, hidden, unembedding, targets)] * 3,
        scratch_shapes=[pltpu.VMEM((t.rows, t.vocab), jnp.float32)] + [pltpu.VMEM((t.rows, 1), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="token_statistics",
    )(temperature.astype(jnp.float32).reshape(1, 1), hidden, unembedding, targets[:, None])
    return tuple(x[:, 0] for x in out)


def _partial(raw: jax.Array, temper, is_target: jax.Array) -> rows.Partial:
    """``rows.partial`` with [N, 1] statistics; here nothing is computed twice, so nothing has to be held back."""
    highest = jnp.max(raw, axis=1, keepdims=True)
    m = temper(highest)
    shifted = jnp.maximum(temper(raw) - jnp.where(m > -jnp.inf, m, 0), rows.IMPOSSIBLE)
    e, is_top = jnp.exp(shifted), raw == highest
    total = lambda x: jnp.sum(x, axis=1, keepdims=True)
    return rows.Partial(
        m=m,
        r=total(jnp.where(is_top, 0, e)) + (total(jnp.where(is_top & (raw > -jnp.inf), 1.0, 0.0)) - 1),
        t=total(jnp.where(is_top, 0, e * shifted)),
        target=temper(total(jnp.where(is_target, raw, 0))),
    )


def _forward(static, hidden, unembedding, targets, temperature):
    out = _statistics(static, hidden, unembedding, targets, temperature)
    return out, (hidden, unembedding, targets, temperature, out)


def _backward(static, residuals, g):
    soft_cap, vocab_size, *_ = static
    hidden, unembedding = residuals[:2]
    width = chunked_xla.block_width(hidden.shape[0], unembedding.shape[1])
    return chunked_xla.backward((soft_cap, vocab_size, 1, width), residuals, g)


_statistics.defvjp(_forward, _backward)
