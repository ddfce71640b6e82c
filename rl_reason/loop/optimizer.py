"""Optimizer steps that a bad gradient cannot spoil and that small updates survive."""

import typing

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree


class Masters(typing.NamedTuple):
    """The optimizer's state where parameters are stored in 16 bits: fp32 parameters that it moves, and its own.

    A bf16 number has 8 significant bits, so that an update below a 512th of it would be lost. What the model computes with
    is at all times exactly the masters, rounded (arXiv:1710.03740, section 3.1).
    """

    params: PyTree
    opt_state: PyTree


def widened(tree: PyTree) -> PyTree:
    """In fp32, where it is not wider."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def init_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The optimizer's state, with masters where any parameter has less than 32 bits."""
    wide = widened(params)
    if all(x.dtype == y.dtype for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(wide), strict=True)):
        return optimizer.init(params)
    return Masters(wide, optimizer.init(wide))


def plain_step(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree, grads: PyTree
) -> tuple[PyTree, PyTree]:
    """(params, opt_state) after a step."""
    if isinstance(opt_state, Masters):
        masters = Masters(*plain_step(optimizer, opt_state.params, opt_state.opt_state, widened(grads)))
        # Not as an update to be added, which would round once more.
        return jax.tree.map(lambda old, new: new.astype(old.dtype), params, masters.params), masters
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


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
    new = plain_step(optimizer, params, opt_state, safe)
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, (params, opt_state))
