"""Reductions over what is valid; 0 where nothing is."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_sum(x: Float[Array, "*s"], mask: Bool[Array, "*s"], axis: int | None = None) -> Float[Array, "..."]:
    """Sum of ``x`` where ``mask``; what is off the mask may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def masked_mean(x: Float[Array, "*s"], mask: Bool[Array, "*s"], axis: int | None = None) -> Float[Array, "..."]:
    """Mean of ``x`` where ``mask``; 0 when nothing is valid.

    >>> import jax.numpy as jnp
    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])))
    1.5
    """
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)
