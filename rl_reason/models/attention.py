"""Attention over whole rows, and the interface through which a block reaches any kind of it."""

import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


@typing.runtime_checkable
class Attend(typing.Protocol):
    """(q [*r H hd], k [*r KV hd], v [*r KV hd]) -> (context [*r H hd], what to keep)."""

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, PyTree]: ...


def causal_attention(
    q: Float[Array, "N T H hd"],
    k: Float[Array, "N T KV hd"],
    v: Float[Array, "N T KV hd"],
    segments: Int[Array, "N T"] | None = None,
) -> tuple[Float[Array, "N T H hd"], None]:
    """softmax(q k^T / sqrt(hd)) v over columns up to one's own; fp32 softmax, or wider if the inputs are.

    Rows are contiguous, so right padding is never seen by a valid token and needs no mask of its own. In packed rows a
    token sees those of its own segment only; as RoPE is relative, it does not matter where in the row that begins.
    """
    if segments is None and jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), None
    rows, width, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    # One batch of plain matrix products: query heads that share a key head are rows of the same matrix. On a CPU this
    # and dividing after the second product are three times faster than the five-axis einsum.
    q = q.reshape(rows, width, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows * kv_heads, groups * width, head_dim)
    k, v = (x.transpose(0, 2, 1, 3).reshape(rows * kv_heads, width, head_dim) for x in (k, v))
    scores = jnp.einsum("bqh,bsh->bqs", q, k, preferred_element_type=accumulate) * head_dim**-0.5
    seen = jnp.tril(jnp.ones((1, width, width), bool))
    if segments is not None:
        seen = jnp.repeat(seen & (segments[:, :, None] == segments[:, None, :]), kv_heads, axis=0)
    scores = jnp.where(jnp.tile(seen, (1, groups, 1)), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    context = jnp.einsum("bqs,bsh->bqh", weights.astype(v.dtype), v, preferred_element_type=accumulate)
    context = (context / weights.sum(-1, keepdims=True)).astype(v.dtype)
    context = context.reshape(rows, kv_heads, groups, width, head_dim).transpose(0, 3, 1, 2, 4)
    return context.reshape(rows, width, heads, head_dim), None


def packed_attention(segments: Int[Array, "N T"]) -> Attend:
    """Causal attention within the segments of packed rows."""
    return functools.partial(causal_attention, segments=segments)


def keep_keys_values(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention that also keeps keys and values: prefill."""
    return causal_attention(q, k, v)[0], (k, v)
