"""The first half of SwiGLU experts: two products of the same rows, and their join.

A kernel that makes both, and writes the join alone, serves where no gradient is asked for. A backward pass wants the two
products, so a forward pass that keeps them is two calls of ``grouped_matmul``. Under ``jax.checkpoint`` the first pass keeps
nothing and is the kernel; the second one is the two calls, so that none multiplies twice.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.grouped_matmul import pallas_hopper, public


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    gate: Float[Array, "_ _ _"],
    up: Float[Array, "_ _ _"],
    group_sizes: Int[Array, " _"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """``silu(grouped_matmul(lhs, gate, group_sizes)) * grouped_matmul(lhs, up, group_sizes)``, with silu(x) = x sigmoid(x).

    gate and up are [E, K, N]; groups, rows beyond them, dtypes and ``implementation`` are those of ``grouped_matmul``. One
    kernel does it for "pallas_hopper", and there products stay in fp32 until the join is rounded; all others are what is
    written above. Gradients are of products rounded to the operands' type, and taken in fp32 at least.
    """
    if gate.shape != up.shape:
        raise ValueError(f"grouped_swiglu: gate {gate.shape} and up {up.shape} have to be of one shape [E, K, N]")
    if gate.shape[:2] != (group_sizes.shape[0], lhs.shape[1]):
        raise ValueError(
            f"grouped_swiglu: gate and up {gate.shape} have to be [E, K, N] with E={group_sizes.shape[0]}, the length of "
            f"group_sizes, and K={lhs.shape[1]}, the columns of lhs {lhs.shape}"
        )
    if implementation is not None:
        dispatch.named("grouped_swiglu", public.IMPLEMENTATIONS, implementation)
    static = implementation, _fused(implementation, lhs, gate, up)
    return _swiglu(static, *dispatch.alike(lhs, gate, up, group_sizes.astype(jnp.int32)))


def _fused(name: str | None, lhs: jax.Array, gate: jax.Array, up: jax.Array) -> bool:
    if name is not None:
        return public.IMPLEMENTATIONS[name].swiglu is not None
    return pallas_hopper.is_default(jnp.result_type(lhs, gate, up), lhs, gate, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(static, lhs, gate, up, group_sizes):
    name, fused = static
    dtype = jnp.result_type(lhs, gate, up)
    kernel = functools.partial(public.call, name=name or "pallas_hopper", method="swiglu", dtype=dtype)
    plain = lambda *operands: _forward(static, *operands)[0]
    if not fused:
        return plain(lhs, gate, up, group_sizes)
    if name is not None:
        return kernel(lhs, gate, up, group_sizes)
    return jax.lax.platform_dependent(lhs, gate, up, group_sizes, cuda=kernel, default=plain)


def _forward(static, lhs, gate, up, group_sizes):
    a, b = (public.grouped_matmul(lhs, w, group_sizes, implementation=static[0]) for w in (gate, up))
    return _join(a, b), (lhs, gate, up, group_sizes, a, b)


def _join(a, b):
    return jax.nn.silu(a) * b


def _backward(static, residuals, g):
    lhs, gate, up, group_sizes, a, b = residuals
    wide = jnp.promote_types(g.dtype, jnp.float32)
    d_a, d_b = jax.vjp(_join, a.astype(wide), b.astype(wide))[1](g.astype(wide))
    pull = lambda w, d: public.gradients(static[0], lhs, w, group_sizes, d)
    (d_lhs, d_gate), (more, d_up) = pull(gate, d_a), pull(up, d_b)
    return d_lhs + more, d_gate, d_up, None


# Where nothing is kept for a backward pass, ``jax.checkpoint`` puts the function itself in place of its forward rule.
_swiglu.defvjp(_forward, _backward, optimize_remat=True)
