"""Blocks of the vocabulary in plain XLA: holds [N, block], never [N, V]; the backward pass computes the logits again.

The unembedding is seen as [D, shards, V / shards] and a block is a range of the last axis, so a vocabulary sharded
over the middle one is cut inside every shard and only [N] statistics cross devices. The gradient of the unembedding is
written block by block into its own buffer, in its own dtype; that of hidden accumulates in fp32 [N, D].
"""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.entropy_covariance import rows
from kernels.entropy_covariance.logits import Head, gradients

BLOCK_BYTES = 2**28  # of one device's block of fp32 logits
MIN_BLOCK = 512  # columns: narrower products waste a matrix unit


def block_width(num_rows: int, width: int) -> int:
    """Columns of a block of ``num_rows`` rows: equal blocks of at most BLOCK_BYTES, multiples of 128 if several."""
    most = max(BLOCK_BYTES // (4 * max(num_rows, 1)), MIN_BLOCK)
    if width <= most:
        return width
    num_blocks = -(-width // most)
    return -(-width // (num_blocks * 128)) * 128


def token_statistics(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, head: Head, row_shards: int, vocab_shards: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there."""
    width = block_width(hidden.shape[0] // row_shards, unembedding.shape[1] // vocab_shards)
    static = head.soft_cap, head.vocab_size, vocab_shards, width
    return _statistics(static, hidden, unembedding, targets, head.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    block = _Blocks(static, hidden, unembedding, targets)
    temper = rows.tempering(temperature, static[0])

    def body(start, width, total):
        raw, is_target = block.raw(start, width)
        # A comparison and a sum where a gather would do: what is sharded here is the vocabulary.
        target = jnp.sum(jnp.where(is_target, raw, 0), axis=(1, 2))
        return rows.merge(total, rows.partial(raw, temper, target, (1, 2)))

    zero = jnp.zeros(hidden.shape[:1], block.dtype)
    nothing = rows.Partial(m=zero - jnp.inf, r=zero - 1, t=zero, target=zero)
    return rows.finish(block.each(body, nothing))


def _forward(static, hidden, unembedding, targets, temperature):
    out = _statistics(static, hidden, unembedding, targets, temperature)
    return out, (hidden, unembedding, targets, temperature, out)


def backward(static, residuals, g):
    """Cotangents of the operands, from those of the statistics; whatever computed these."""
    hidden, unembedding, targets, temperature, (_, entropy, logsumexp) = residuals
    block = _Blocks(static, hidden, unembedding, targets)
    temper = rows.tempering(temperature, static[0])
    column = lambda x: x[:, None, None]
    g = tuple(column(x) for x in g)

    def body(start, width, carry):
        d_hidden, d_weight = carry
        raw, is_target = block.raw(start, width)
        dz = rows.cotangent(temper(raw), is_target, column(logsumexp), column(entropy), g)
        d_raw = (dz * rows.slope(raw, temperature, static[0])).reshape(raw.shape[0], -1)
        more, d_block = gradients(block.hidden, block.weight(start, width), d_raw, unembedding.dtype)
        d_block = d_block.reshape(*block.shape[:2], width)
        return d_hidden + more, jax.lax.dynamic_update_slice_in_dim(d_weight, d_block, start, axis=2)

    init = jnp.zeros(hidden.shape, block.dtype), jnp.zeros(block.shape, unembedding.dtype)
    d_hidden, d_weight = block.each(body, init)
    return d_hidden.astype(hidden.dtype), d_weight.reshape(unembedding.shape), None, None


_statistics.defvjp(_forward, backward)


def each_block(size, width, body, carry):
    """Folds ``body(start, width, carry)`` over equal blocks, then over a narrower last one."""
    full, rest = divmod(size, width)
    if full == 1:
        carry = body(0, width, carry)
    else:
        step = lambda i, carry: body(i * width, width, carry)
        carry = jax.lax.fori_loop(jnp.int32(0), jnp.int32(full), step, carry)
    return body(full * width, rest, carry) if rest else carry


class _Blocks:
    """One call's operands and the walk over its blocks of the vocabulary."""

    def __init__(self, static, hidden, unembedding, targets):
        _, self.vocab_size, shards, self.width = static
        self.operands = jnp.result_type(hidden, unembedding)
        self.dtype = jnp.promote_types(self.operands, jnp.float32)
        self.hidden, self.targets = hidden.astype(self.operands), targets
        self.shape = (unembedding.shape[0], shards, unembedding.shape[1] // shards)
        self.unembedding = unembedding.reshape(self.shape)

    def each(self, body, carry):
        carry = jax.tree.map(lambda x: dispatch.varying(x, self.hidden, self.unembedding, self.targets), carry)
        return each_block(self.shape[2], self.width, body, carry)

    def weight(self, start, width):
        """The block's columns [D, shards * width]: products of two matrices are what all backends have in bf16."""
        cut = jax.lax.dynamic_slice_in_dim(self.unembedding, start, width, axis=2)
        return cut.astype(self.operands).reshape(self.shape[0], -1)

    def raw(self, start, width):
        """hidden @ unembedding of a block [N, shards, width], -inf from vocab_size on, and where the target is."""
        raw = jnp.matmul(self.hidden, self.weight(start, width), preferred_element_type=self.dtype)
        raw = raw.reshape(-1, self.shape[1], width)
        shard = jax.lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        ids = shard * self.shape[2] + start + jax.lax.broadcasted_iota(jnp.int32, raw.shape, 2)
        if self.vocab_size < self.shape[1] * self.shape[2]:
            raw = jnp.where(ids < self.vocab_size, raw, -jnp.inf)
        return raw, ids == self.targets[:, None, None]
