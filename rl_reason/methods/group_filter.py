"""Which groups to train on."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mixed(
    correct: Float[Array, "B G"], valid: Bool[Array, "B G"], *, low: float, high: float
) -> tuple[Bool[Array, "B G"], dict[str, Array]]:
    """Keeps groups whose success rate lies strictly between ``low`` and ``high``; 0 and 1 is DAPO's dynamic sampling
    (arXiv:2503.14476): groups all right or all wrong have no advantage and are dropped.

    The rate is over valid rows, by the unshaped verdict; a group with no valid row is dropped.
    """
    count = valid.sum(-1, keepdims=True)
    rate = jnp.where(valid, correct, 0.0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    return valid & (rate > low) & (rate < high), {}
