"""Attention over whole rows, and the interface through which a block reaches any kind of it."""

import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

QUERY_BLOCK = 1024  # queries scored at a time in longer rows: scores are never [T, T] there


@typing.runtime_checkable
class Attend(typing.Protocol):
    """(q [*r H hd], k [*r KV hd], v [*r KV hd]) -> (context [*r H hd], what to keep)."""

    def __call__(self, q: Array, k: Array, v: Array) -> tuple[Array, PyTree]: ...


@typing.runtime_checkable
class AttendRows(typing.Protocol):
    """The same over rows [N T ...], told how the layer attends: ``causal_attention``'s keywords."""

    def __call__(
        self, q: Array, k: Array, v: Array, *, scale: float, soft_cap: float | None, window: int | Array | None
    ) -> tuple[Array, PyTree]: ...


def causal_attention(
    q: Float[Array, "N T H hd"],
    k: Float[Array, "N T KV hd"],
    v: Float[Array, "N T KV hd"],
    segments: Int[Array, "N T"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "N T H hd"], None]:
    """softmax(soft_cap tanh(scale q k^T / soft_cap)) v over columns up to one's own; fp32 softmax, or wider.

    ``scale`` is hd^-0.5 unless given; ``window=w`` leaves the last w columns, one's own included, and may be traced.
    Rows are contiguous, so right padding is never seen by a valid token and needs no mask of its own. In packed rows a
    token sees those of its own segment only; as RoPE is relative, it does not matter where in the row that begins.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = segments is None and soft_cap is None and (window is None or isinstance(window, int))
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and plain:
        seen = None if window is None else (window - 1, 0)
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True)
        return attend(q, k, v, scale=scale, local_window_size=seen), None
    width = q.shape[1]
    if width <= QUERY_BLOCK:
        return _attend(q, k, v, segments, 0, 0, window, scale, soft_cap), None
    # Blocks of queries, each against the columns that it can see, and computed again for the gradient.
    blocks = []
    for start in range(0, width, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, width)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        block = jax.checkpoint(functools.partial(_attend, start=start, first=first, scale=scale, soft_cap=soft_cap))
        seen = None if segments is None else segments[:, :end]
        blocks.append(block(q[:, start:end], k[:, first:end], v[:, first:end], seen, window=window))
    return jnp.concatenate(blocks, axis=1), None


def _attend(
    q: Float[Array, "N Q H hd"],
    k: Float[Array, "N S KV hd"],
    v: Float[Array, "N S KV hd"],
    segments: Int[Array, "N E"] | None,
    start: int,
    first: int,
    window: int | Int[Array, ""] | None,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "N Q H hd"]:
    """Queries of the columns from ``start`` on against keys of the columns from ``first`` on."""
    rows, width, heads, head_dim = q.shape
    columns, kv_heads = k.shape[1:3]
    groups = heads // kv_heads
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    # One batch of plain matrix products: query heads that share a key head are rows of the same matrix. On a CPU this
    # and dividing after the second product are three times faster than the five-axis einsum.
    q = q.reshape(rows, width, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows * kv_heads, groups * width, head_dim)
    k, v = (x.transpose(0, 2, 1, 3).reshape(rows * kv_heads, columns, head_dim) for x in (k, v))
    scores = jnp.einsum("bqh,bsh->bqs", q, k, preferred_element_type=accumulate) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = _seen(start, width, first, columns, window)[None]
    if segments is not None:
        same = segments[:, start:, None] == segments[:, None, first:]
        seen = jnp.repeat(seen & same, kv_heads, axis=0)
    scores = jnp.where(jnp.tile(seen, (1, groups, 1)), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    context = jnp.einsum("bqs,bsh->bqh", weights.astype(v.dtype), v, preferred_element_type=accumulate)
    context = (context / weights.sum(-1, keepdims=True)).astype(v.dtype)
    context = context.reshape(rows, kv_heads, groups, width, head_dim).transpose(0, 3, 1, 2, 4)
    return context.reshape(rows, width, heads, head_dim)


def _seen(start: int, width: int, first: int, columns: int, window: int | Int[Array, ""] | None) -> Bool[Array, "Q S"]:
    """Which columns each query sees: up to its own, and the last ``window`` of those."""
    query, column = jnp.arange(start, start + width)[:, None], jnp.arange(first, first + columns)
    return (column <= query) if window is None else (column <= query) & (column > query - window)


def packed_attention(segments: Int[Array, "N T"]) -> AttendRows:
    """Causal attention within the segments of packed rows."""
    return functools.partial(causal_attention, segments=segments)


def keep_keys_values(q: Array, k: Array, v: Array, **how: typing.Any) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention that also keeps keys and values: prefill."""
    return causal_attention(q, k, v, **how)[0], (k, v)
