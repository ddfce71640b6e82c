"""What else does the same, where it is installed: for ``kernels.bench`` alone. Each raises what its library raises."""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


class Peer(typing.NamedTuple):
    """``wait(call())`` does the work once; ``output()`` is what it gives, for comparison."""

    call: Callable[[], typing.Any]
    wait: Callable[[typing.Any], typing.Any]
    output: Callable[[], typing.Any]
    temporary_bytes: int | None = None


def compiled(function: Callable, *arguments: jax.Array) -> Peer:
    """A function of ours, compiled for these arguments."""
    run = jax.jit(function).lower(*arguments).compile()
    memory = run.memory_analysis()
    call = lambda: run(*arguments)
    return Peer(call, jax.block_until_ready, call, None if memory is None else memory.temp_size_in_bytes)


def _torch():
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    return torch


def _operands(torch: typing.Any, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, g: jax.Array) -> list[typing.Any]:
    take = lambda x: torch.from_dlpack(x).clone()
    ends = torch.tensor(np.cumsum(np.asarray(sizes)), dtype=torch.int32, device="cuda")
    return [take(lhs), take(rhs), ends, take(g)]


def torch_grouped(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, g: jax.Array) -> Peer:
    """``torch._grouped_mm``."""
    torch = _torch()
    x, w, ends, _ = _operands(torch, lhs, rhs, sizes, g)
    call = lambda: torch._grouped_mm(x, w, ends)
    return Peer(call, lambda _: torch.cuda.synchronize(), lambda: jnp.from_dlpack(call()))


def torch_grouped_gradients(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, g: jax.Array) -> Peer:
    """Its gradients for both operands."""
    torch = _torch()
    x, w, ends, d = _operands(torch, lhs, rhs, sizes, g)
    x.requires_grad_()
    w.requires_grad_()
    out = torch._grouped_mm(x, w, ends)
    call = lambda: torch.autograd.grad(out, (x, w), d, retain_graph=True)
    return Peer(call, lambda _: torch.cuda.synchronize(), lambda: tuple(jnp.from_dlpack(y) for y in call()))


def tokamax_grouped(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, g: jax.Array) -> Peer:
    """``tokamax.ragged_dot``."""
    del g
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError("tokamax is not installed") from error
    run = jax.jit(tokamax.ragged_dot)
    call = lambda: run(lhs, rhs, group_sizes=sizes)
    return Peer(call, jax.block_until_ready, call)


def cudnn_attention(queries: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array) -> Peer:
    """cuDNN's attention through JAX, which takes row lengths, a layer sliced out of the stack at a time."""
    if jax.default_backend() != "gpu":
        raise RuntimeError("cuDNN needs a CUDA device")

    @jax.jit
    def every_layer(q, keys, values, lengths):
        def attend(layer, q):
            k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in (keys, values))
            ones = jnp.ones_like(lengths)
            out = jax.nn.dot_product_attention(
                q[:, None], k, v, query_seq_lengths=ones, key_value_seq_lengths=lengths, implementation="cudnn"
            )
            return out[:, 0]

        return jax.lax.fori_loop(0, keys.shape[0], attend, q)

    call = lambda: every_layer(queries, keys, values, lengths)
    return Peer(call, jax.block_until_ready, call)


def plain_statistics(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> Peer:
    """What one would write: all logits, their log-softmax in fp32."""
    return compiled(_plain, hidden, unembedding, targets)


def plain_statistics_gradients(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> Peer:
    """And JAX's own gradients of it."""

    def loss(hidden, unembedding, targets):
        logprob, entropy, _ = _plain(hidden, unembedding, targets)
        return logprob.mean() + 0.1 * entropy.mean()

    return compiled(jax.value_and_grad(loss, argnums=(0, 1)), hidden, unembedding, targets)


def _plain(hidden, unembedding, targets):
    logits = jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0]
    return logprob, -jnp.sum(jnp.exp(logp) * logp, axis=1), jax.nn.logsumexp(logits, axis=1)
