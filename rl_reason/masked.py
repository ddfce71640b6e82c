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


def ranking_accuracy(
    scores: Float[Array, " N"], right: Bool[Array, " N"], valid: Bool[Array, " N"]
) -> Float[Array, ""]:
    """The chance that a right row scores above a wrong one (AUC of the ROC), ties half; 1/2 without a pair.

    >>> import jax.numpy as jnp
    >>> scores, right = jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([True, True, False, False])
    >>> float(ranking_accuracy(scores, right, jnp.ones(4, bool)))  # pairs: 1, 1, 1/2, 1
    0.875
    """
    wrong = valid & ~right
    below = jnp.sort(jnp.where(wrong, scores, jnp.inf))
    under, upto = (jnp.searchsorted(below, scores, side=side) for side in ("left", "right"))
    count = wrong.sum()
    share = (under + jnp.minimum(upto, count)) / (2 * jnp.maximum(count, 1)).astype(scores.dtype)
    return jnp.where((count > 0) & (valid & right).any(), masked_mean(share, valid & right), 0.5)
