"""Drawing a token from logits, with every knob traced: changing one never recompiles."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rl_reason.types import struct


@struct
class Sampling:
    """How to draw. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch themselves off."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]


def make_sampling(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    """Checked knobs as arrays.

    Raises:
        ValueError: a knob out of its range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            f"sampling(temperature={temperature}, top_k={top_k}, top_p={top_p}, min_p={min_p}): want temperature >= 0, "
            "top_k >= 0 (0 is off), 0 < top_p <= 1, 0 <= min_p <= 1."
        )
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def truncation_mask(logprobs: Float[Array, "S V"], sampling: Sampling) -> Bool[Array, "S V"]:
    """True for tokens that survive top-k, then top-p, then min-p; the likeliest token always does.

    Ties at a threshold all survive. top-p keeps the smallest set of likeliest tokens whose mass reaches top_p, of what
    top-k left, renormalised (the order vLLM and transformers apply them in).
    """
    vocab = logprobs.shape[-1]
    ranked = -jnp.sort(-logprobs, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kept = jnp.where(jnp.arange(vocab) < k, ranked, -jnp.inf)
    mass = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    kept = jnp.where(before < sampling.top_p, kept, -jnp.inf).at[:, 0].set(ranked[:, 0])
    threshold = jnp.min(jnp.where(kept > -jnp.inf, kept, jnp.inf), axis=-1, keepdims=True)
    floor = ranked[:, :1] + jnp.log(sampling.min_p)
    return logprobs >= jnp.maximum(threshold, jnp.minimum(floor, ranked[:, :1]))


def sample(
    keys: Key[Array, " S"], logits: Float[Array, "S V"], sampling: Sampling
) -> tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]:
    """One token a row: (token, its log-probability under the full vocabulary, under the distribution drawn from).

    Both at the temperature, in nats; at temperature 0 the first is at temperature 1 and the second is 0.
    Each row draws from its own key, so a draw depends on nothing but its own row: the token that wins the race
    argmax p / E with E ~ Exp(1), which is the Gumbel-max draw with one logarithm less.
    """
    truncates = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    # Whole draws in the branches: nothing as large as the logits passes between them, and none of it is ever stored.
    draw = lambda truncated: functools.partial(_draw, truncated=truncated)
    return jax.lax.cond(truncates, draw(True), draw(False), keys, logits, sampling)


def _draw(keys, logits, sampling: Sampling, *, truncated: bool):
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    greedy = sampling.temperature <= 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature).astype(dtype)
    highest = logits.max(axis=-1) / temperature
    scaled = logits / temperature - highest[:, None]
    mass = jnp.exp(scaled)
    total = left = jnp.log(mass.sum(-1))
    if truncated:
        mass = jnp.where(truncation_mask(scaled - total[:, None], sampling), mass, 0.0)  # the likeliest stays
        left = jnp.log(mass.sum(-1))
    smallest = jnp.finfo(dtype).tiny
    uniform = jax.vmap(lambda key: jax.random.uniform(key, mass.shape[-1:], dtype, minval=smallest))(keys)
    token = _first_argmax(mass / jnp.where(greedy, 1.0, -jnp.log(uniform)))
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] / temperature - highest
    return token, chosen - total, jnp.where(greedy, 0.0, chosen - left)


def _first_argmax(x: Float[Array, "S V"]) -> Int[Array, " S"]:
    """The lowest index of each row's maximum."""

    def in_two(x):  # plain reductions, several times faster on a CPU than jnp.argmax
        index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1])
        return jnp.minimum(index.min(-1), x.shape[-1] - 1)  # a row of NaN has no maximum

    in_one = lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32)
    return jax.lax.platform_dependent(x, cpu=in_two, default=in_one)
