"""Blocks of rows in plain XLA, for small vocabularies: a block's logits stay in a CPU's cache and are computed twice.

Block i of n holds rows i, i + n, i + 2 n, ...: rows sharded over devices then give every device its share of each
block, where contiguous blocks would move them.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.entropy_covariance.logits import Head, gradients

BLOCK_BYTES = 2**21  # of one block of fp32 logits: about a core's second-level cache
MIN_ROWS = 64


def token_statistics(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, head: Head, row_shards: int, vocab_shards: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there."""
    del vocab_shards  # the compiler splits whole rows by itself
    block_rows = max(BLOCK_BYTES // (4 * unembedding.shape[1]), MIN_ROWS) * row_shards
    static = head.soft_cap, head.vocab_size, block_rows
    return _statistics(static, hidden, unembedding, targets, head.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    soft_cap, vocab_size, block_rows = static
    head = Head(temperature, soft_cap, vocab_size)

    def body(carry, block):
        return carry, head.statistics(head.raw(block[0], unembedding), block[1])

    return _each(body, None, (hidden, targets), block_rows)[1]


def _forward(static, hidden, unembedding, targets, temperature):
    out = _statistics(static, hidden, unembedding, targets, temperature)
    return out, (hidden, unembedding, targets, temperature, out)


def _backward(static, residuals, g):
    soft_cap, vocab_size, block_rows = static
    hidden, unembedding, targets, temperature, out = residuals
    head = Head(temperature, soft_cap, vocab_size)
    accumulate = jnp.promote_types(jnp.result_type(hidden, unembedding), jnp.float32)

    def body(d_weight, block):
        h, targets, out, g = block
        d_raw = head.cotangent(head.raw(h, unembedding), targets, out, g)
        d_hidden, more = gradients(h, unembedding, d_raw)
        return d_weight + more, d_hidden.astype(hidden.dtype)

    d_weight = jnp.zeros(unembedding.shape, accumulate)
    d_weight, d_hidden = _each(body, d_weight, (hidden, targets, out, g), block_rows)
    return d_hidden, d_weight.astype(unembedding.dtype), None, None


_statistics.defvjp(_forward, _backward)


def _each(body, carry, arrays, block_rows):
    """``jax.lax.scan`` of ``body`` over blocks of the leading axis of ``arrays``; rows left over are a last block."""
    num_rows = jax.tree.leaves(arrays)[0].shape[0]
    num_blocks = -(-num_rows // block_rows)
    if num_blocks <= 1:
        return body(carry, arrays)
    size = num_rows // num_blocks
    split = lambda x: jnp.moveaxis(x[: size * num_blocks].reshape(size, num_blocks, *x.shape[1:]), 1, 0)
    carry, out = jax.lax.scan(body, carry, jax.tree.map(split, arrays))
    out = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(size * num_blocks, *y.shape[2:]), out)
    if size * num_blocks == num_rows:
        return carry, out
    carry, rest = body(carry, jax.tree.map(lambda x: x[size * num_blocks :], arrays))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
