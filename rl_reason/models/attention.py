"""Attention over whole rows, and the interface through which a block reaches any kind of it."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Attend(typing.Protocol):
    """(q [*r H hd], k [*r KV hd], v [*r KV hd]) -> (context [*r H hd], what to keep)."""

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, PyTree]: ...


def causal_attention(
    q: Float[Array, "N T H hd"], k: Float[Array, "N T KV hd"], v: Float[Array, "N T KV hd"]
) -> tuple[Float[Array, "N T H hd"], None]:
    """softmax(q k^T / sqrt(hd)) v over columns up to one's own; fp32 softmax, or wider if the inputs are.

    Rows are contiguous, so right padding is never seen by a valid token and needs no mask of its own.
    """
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), None
    rows, width, heads, head_dim = q.shape
    groups = heads // k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(rows, width, k.shape[2], groups, head_dim)
    scores = jnp.einsum("nqkgh,nskh->nkgqs", q, k, preferred_element_type=accumulate) * head_dim**-0.5
    causal = jnp.tril(jnp.ones((width, width), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("nkgqs,nskh->nqkgh", weights, v).reshape(rows, width, heads, head_dim), None


def keep_keys_values(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention that also keeps keys and values: prefill."""
    return causal_attention(q, k, v)[0], (k, v)
