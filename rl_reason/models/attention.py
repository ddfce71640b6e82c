"""Attention over whole rows, and the interface through which a block reaches any kind of it."""

import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kernels import dispatch
from rl_reason.models import splash

LONG_ROW = 1024  # tokens up to which a row's scores are made all at once
SCORES_BYTES = 2**28  # of fp32 scores that a longer row has at a time; over heads, were none cut over devices
SPANS = 4  # of a longer row's queries, each of which reads the columns up to its own end


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
    plain = segments is None and soft_cap is None and not isinstance(window, jax.Array)
    if dispatch.platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and plain:
        seen = (window - 1, 0) if isinstance(window, int) else None
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", is_causal=True)
        return attend(q, k, v, scale=scale, local_window_size=seen), None
    how = dict(scale=scale, soft_cap=soft_cap)
    if isinstance(window, jax.Array) or splash.unfit(*q.shape[1:4:2]):
        return _by_xla(q, k, v, segments, window=window, **how), None
    # Decided when lowered, not when traced: a CPU machine may be compiling for a TPU.
    return jax.lax.platform_dependent(
        *(q, k, v, segments),
        tpu=functools.partial(splash.attention, window=window, **how),
        default=functools.partial(_by_xla, window=window, **how),
    ), None


def _by_xla(q, k, v, segments, **how):
    width = q.shape[1]
    if width <= LONG_ROW:
        return _attend(q, k, v, segments, segments, jnp.arange(width), jnp.arange(width), **how)
    # Spans of queries, each against the columns up to its end: with four of them a fifth of the products is for nothing.
    span = width if isinstance(how["window"], int) else -(-width // SPANS)
    parts = []
    for start in range(0, width, span):
        end = min(start + span, width)
        seen = None if segments is None else segments[:, :end]
        parts.append(_in_blocks(q[:, start:end], k[:, :end], v[:, :end], seen, start, **how))
    return jnp.concatenate(parts, axis=1)


def _in_blocks(
    q: Float[Array, "N Q H hd"],
    k: Float[Array, "N S KV hd"],
    v: Float[Array, "N S KV hd"],
    segments: Int[Array, "N S"] | None,
    start: int,
    *,
    window: int | Int[Array, ""] | None,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "N Q H hd"]:
    """Queries of the columns from ``start`` on, some at a time, computed again for the gradient: scores are never [Q S].

    With a static window a block reads the columns that it can see alone.
    """
    queries, columns = q.shape[1], k.shape[1]
    block = min(queries, max(8, SCORES_BYTES // (4 * q.shape[2] * columns) // 8 * 8))
    blocks = -(-queries // block)
    width = min(columns, block + window - 1) if isinstance(window, int) else columns

    def cut(x: Array) -> Array:  # [N Q ...] -> [blocks N block ...]
        x = jnp.pad(x, ((0, 0), (0, blocks * block - queries), *((0, 0),) * (x.ndim - 2)), mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(of_block):
        own, own_segments, index = of_block
        begin = start + index * block
        first = jnp.clip(begin + block - width, 0, columns - width) if width < columns else 0
        read = lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=1) if width < columns else x
        their_segments = None if segments is None else read(segments)
        # What fills up the last block sees what the last query does: something, so that its gradient is no NaN.
        query = jnp.minimum(begin + jnp.arange(block), columns - 1)
        return _attend(
            *(own, read(k), read(v), own_segments, their_segments, query, first + jnp.arange(width)),
            window=window,
            scale=scale,
            soft_cap=soft_cap,
        )

    own_segments = None if segments is None else cut(segments[:, start:])
    out = jax.lax.map(one, (cut(q), own_segments, jnp.arange(blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * block, *q.shape[2:])[:, :queries]


def _attend(
    q: Float[Array, "N Q H hd"],
    k: Float[Array, "N S KV hd"],
    v: Float[Array, "N S KV hd"],
    own_segments: Int[Array, "N Q"] | None,
    segments: Int[Array, "N S"] | None,
    query: Int[Array, " Q"],
    column: Int[Array, " S"],
    *,
    window: int | Int[Array, ""] | None,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "N Q H hd"]:
    """Queries against keys, which of a row's columns those are given as numbers."""
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
    seen = (column <= query[:, None])[None]  # up to its own, and the last ``window`` of those
    if window is not None:
        seen &= column > query[:, None] - window
    if own_segments is not None and segments is not None:
        seen = jnp.repeat(seen & (own_segments[:, :, None] == segments[:, None, :]), kv_heads, axis=0)
    scores = jnp.where(jnp.tile(seen, (1, groups, 1)), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    context = jnp.einsum("bqs,bsh->bqh", weights.astype(v.dtype), v, preferred_element_type=accumulate)
    context = (context / weights.sum(-1, keepdims=True)).astype(v.dtype)
    context = context.reshape(rows, kv_heads, groups, width, head_dim).transpose(0, 3, 1, 2, 4)
    return context.reshape(rows, width, heads, head_dim)


def packed_attention(segments: Int[Array, "N T"]) -> AttendRows:
    """Causal attention within the segments of packed rows."""
    return functools.partial(causal_attention, segments=segments)


def keep_keys_values(q: Array, k: Array, v: Array, **how: typing.Any) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention that also keeps keys and values: prefill."""
    return causal_attention(q, k, v, **how)[0], (k, v)
