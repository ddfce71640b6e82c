"""Rows that see the whole vocabulary: from hidden states to statistics and the way back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.entropy_covariance import rows


class Head(NamedTuple):
    """What turns hidden states into logits, the unembedding aside."""

    temperature: jax.Array
    soft_cap: float | None
    vocab_size: int

    def raw(self, hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
        """hidden @ unembedding [N, V], -inf from vocab_size on; fp32, or fp64 for fp64 inputs."""
        accumulate = jnp.promote_types(jnp.result_type(hidden, unembedding), jnp.float32)
        raw = jnp.matmul(hidden, unembedding, preferred_element_type=accumulate)
        if self.vocab_size < raw.shape[1]:
            raw = jnp.where(jax.lax.broadcasted_iota(jnp.int32, raw.shape, 1) < self.vocab_size, raw, -jnp.inf)
        return raw

    def statistics(self, raw: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(logprob, entropy, logsumexp) [N]."""
        vocab = raw.shape[1]
        # A gather of one column a row: XLA masks and sums it over the shards of a sharded vocabulary.
        target = jnp.take_along_axis(raw, jnp.clip(targets, 0, vocab - 1)[:, None], axis=1, mode="clip")[:, 0]
        target = jnp.where((targets >= 0) & (targets < vocab), target, 0)
        return rows.finish(rows.partial(raw, rows.tempering(self.temperature, self.soft_cap), target))

    def cotangent(self, raw: jax.Array, targets: jax.Array, out: tuple, g: tuple) -> jax.Array:
        """Cotangent of raw [N, V] from those, ``g``, of its statistics ``out``."""
        _, entropy, logsumexp = out
        z = rows.tempering(self.temperature, self.soft_cap)(raw)
        is_target = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == targets[:, None]
        dz = rows.cotangent(z, is_target, logsumexp[:, None], entropy[:, None], tuple(x[:, None] for x in g))
        return dz * rows.slope(raw, self.temperature, self.soft_cap)


def gradients(
    hidden: jax.Array, unembedding: jax.Array, d_raw: jax.Array, dtype: jnp.dtype | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of both operands from that of their product, accumulated in fp32 at least; the second is rounded to
    ``dtype``, if that is given.

    ``d_raw`` is rounded to the operands' type first: autodiff would widen them instead, and a bf16 product that has
    become one of fp32 takes several times as long. Infinite weights belong to columns of probability 0.
    """
    operands = jnp.result_type(hidden, unembedding)
    accumulate = jnp.promote_types(operands, jnp.float32)
    dtype = accumulate if dtype is None else dtype
    d_raw = d_raw.astype(operands)
    finite = jnp.where(jnp.isfinite(unembedding), unembedding, 0).astype(operands)  # no 0 * inf
    d_hidden = jnp.einsum("nv,dv->nd", d_raw, finite, preferred_element_type=accumulate)
    written = dtype if dtype == operands else accumulate  # a product rounds to its operands' type by itself
    d_weight = jnp.einsum("nd,nv->dv", hidden.astype(operands), d_raw, preferred_element_type=written)
    return d_hidden, d_weight.astype(dtype)
