"""Optimizer steps that a bad gradient cannot spoil."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree


def optimizer_step(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    *,
    finite: Bool[Array, ""],
    taken: Bool[Array, ""],
) -> tuple[PyTree, PyTree]:
    """(params, opt_state) after a step, or as they were unless it is ``taken``; ``finite`` is of the gradient."""
    # Zeros keep NaN out of the optimizer's arithmetic; the select below discards what it makes of them.
    safe = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)
    updates, new_state = optimizer.update(safe, opt_state, params)
    new = optax.apply_updates(params, updates), new_state
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, (params, opt_state))
