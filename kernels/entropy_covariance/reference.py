"""The meaning: full logits [N, V], kept for the backward pass."""

import functools

import jax

from kernels.entropy_covariance.logits import Head, gradients


def token_statistics(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, head: Head, row_shards: int, vocab_shards: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N]; arguments as in the public function, validated there."""
    del row_shards, vocab_shards  # the compiler splits whole rows by itself
    return _statistics((head.soft_cap, head.vocab_size), hidden, unembedding, targets, head.temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden, unembedding, targets, temperature):
    head = Head(temperature, *static)
    return head.statistics(head.raw(hidden, unembedding), targets)


def _forward(static, hidden, unembedding, targets, temperature):
    head = Head(temperature, *static)
    raw = head.raw(hidden, unembedding)
    out = head.statistics(raw, targets)
    return out, (hidden, unembedding, targets, temperature, raw, out)


def _backward(static, residuals, g):
    hidden, unembedding, targets, temperature, raw, out = residuals
    d_raw = Head(temperature, *static).cotangent(raw, targets, out, g)
    d_hidden, d_weight = gradients(hidden, unembedding, d_raw, unembedding.dtype)
    return d_hidden.astype(hidden.dtype), d_weight, None, None


_statistics.defvjp(_forward, _backward)
