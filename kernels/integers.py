"""Whole numbers, inside kernels and around them."""

import jax
import jax.numpy as jnp


def div(x: jax.Array, by: int) -> jax.Array:
    """x / by towards zero, in x's type: one instruction, where ``//`` looks at signs."""
    return jax.lax.div(x, jnp.full_like(x, by))


def rem(x: jax.Array, by: int) -> jax.Array:
    """What ``div`` leaves."""
    return jax.lax.rem(x, jnp.full_like(x, by))


def ranks(keys: jax.Array) -> jax.Array:
    """Int32 [N], where each of ``keys`` [N] stands when they are sorted, ties by index.

    By comparisons of all pairs, as is ``in_order``: to sort a few hundred takes a GPU several kernels.
    """
    index = jnp.arange(len(keys), dtype=jnp.int32)
    before = (keys[None] < keys[:, None]) | ((keys[None] == keys[:, None]) & (index[None] < index[:, None]))
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def in_order(rank: jax.Array, x: jax.Array) -> jax.Array:
    """Int32 [N] ``x`` in the order of the ranks."""
    index = jnp.arange(len(rank), dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None] == index[:, None], x[None], 0), axis=1, dtype=jnp.int32)
