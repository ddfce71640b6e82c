"""Softmax statistics of rows of logits as mergeable partial sums, without cancellation.

For a row z with maximum m, attained c times:

    r = sum_{z < m} exp(z - m) + (c - 1)          so that sum_v exp(z - m) = 1 + r exactly
    t = sum_v exp(z - m) (z - m)                  <= 0
    logsumexp = m + log1p(r)
    logprob_y = (z_y - m) - log1p(r)
    entropy   = log1p(r) - t / (1 + r)            two terms >= 0: accurate however small the entropy

``logsumexp - E[z]`` would lose every digit of an entropy below eps |z|. A logit of -inf has probability 0 and adds
nothing (0 * -inf counts as 0).

Compilers compute z anew in every reduction, and contract ``z - m`` into a fused multiply-add in some of them only: it
is then not 0 where z is m. So the maximum is found among the raw products, which lie in memory and only get compared,
and single numbers a row pass a barrier before they are subtracted.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

IMPOSSIBLE = -1e4  # a log-probability whose exp is exactly 0, in fp64 too, and that times 0 is 0, as -inf is not


class Partial(NamedTuple):
    """Statistics [N] of a part of the vocabulary; a part may hold nothing but -inf (m = -inf, r = -1)."""

    m: jax.Array  # maximum
    r: jax.Array  # sum of exp(z - m), less 1
    t: jax.Array  # sum of exp(z - m) (z - m)
    target: jax.Array  # logit of the target, 0 where the target is in another part


def capped(raw: jax.Array, soft_cap: float | None) -> jax.Array:
    """``soft_cap tanh(raw / soft_cap)``, but -inf stays; None for no cap."""
    return raw if soft_cap is None else jnp.where(raw > -jnp.inf, soft_cap * jnp.tanh(raw / soft_cap), -jnp.inf)


def tempering(temperature: jax.Array, soft_cap: float | None) -> Callable[[jax.Array], jax.Array]:
    """The increasing function from raw products to logits; it keeps 0, and -inf too, whatever the cap."""
    return lambda raw: capped(raw, soft_cap) / temperature.astype(raw.dtype)


def slope(raw: jax.Array, temperature: jax.Array, soft_cap: float | None) -> jax.Array:
    """d logit / d raw, to broadcast against ``raw``."""
    inverse = 1 / temperature.astype(raw.dtype)
    return inverse if soft_cap is None else inverse * (1 - jnp.tanh(raw / soft_cap) ** 2)


def partial(
    raw: jax.Array, temper: Callable[[jax.Array], jax.Array], target: jax.Array, axes: tuple[int, ...] = (1,)
) -> Partial:
    """Statistics of ``temper(raw)`` [N, ...] over ``axes``; ``target`` [N] is the target's raw value, or 0."""
    highest = jnp.max(raw, axis=axes, keepdims=True)
    m, target = jax.lax.optimization_barrier((temper(highest), temper(target)))
    shifted = jnp.maximum(temper(raw) - jnp.where(m > -jnp.inf, m, 0), IMPOSSIBLE)
    e = jnp.exp(shifted)
    is_top = raw == highest
    num_top = jnp.sum(jnp.where(is_top & (raw > -jnp.inf), 1, 0).astype(raw.dtype), axis=axes)
    return Partial(
        m=jnp.squeeze(m, axes),
        r=jnp.sum(jnp.where(is_top, 0, e), axis=axes) + (num_top - 1),
        t=jnp.sum(jnp.where(is_top, 0, e * shifted), axis=axes),
        target=target,
    )


def merge(a: Partial, b: Partial) -> Partial:
    """Statistics of the union of two disjoint parts."""
    swap = b.m > a.m
    hi = jax.tree.map(lambda x, y: jnp.where(swap, y, x), a, b)
    lo = jax.tree.map(lambda x, y: jnp.where(swap, x, y), a, b)
    gap = jnp.where(lo.m > -jnp.inf, lo.m - hi.m, 0)
    sum_lo = 1 + lo.r  # 0 for a part of nothing but -inf
    return Partial(
        m=hi.m,
        r=hi.r + sum_lo * jnp.exp(gap),
        t=hi.t + (lo.t + gap * sum_lo) * jnp.exp(gap),
        target=a.target + b.target,
    )


def finish(p: Partial) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprob, entropy, logsumexp) [N], nats."""
    log_sum = jnp.log1p(p.r)
    return (p.target - p.m) - log_sum, log_sum - p.t / (1 + p.r), p.m + log_sum


def cotangent(
    z: jax.Array, is_target: jax.Array, logsumexp: jax.Array, entropy: jax.Array, g: tuple[jax.Array, ...]
) -> jax.Array:
    """Cotangent of logits z from those of (logprob, entropy, logsumexp); all but ``is_target`` broadcast against z.

    d logprob = 1_y - p,  d logsumexp = p,  d entropy = -p (log p + H).
    """
    g_logprob, g_entropy, g_logsumexp = g
    logp = jnp.maximum(z - logsumexp, IMPOSSIBLE)
    weighted = jnp.exp(logp) * ((g_logsumexp - g_logprob) - g_entropy * (logp + entropy))
    return weighted + jnp.where(is_target, g_logprob, 0)
