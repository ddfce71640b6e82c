"""Every implementation of token_statistics agrees with float64 on random heads, however extreme."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from kernels.entropy_covariance import chunked_xla, token_statistics
from kernels.entropy_covariance.public import IMPLEMENTATIONS
from tests.support import portable

N, D, V = 6, 4, 300
NAMES = portable(IMPLEMENTATIONS)


@functools.partial(jax.jit, static_argnames="name")
def run(hidden, weight, targets, temperature, name):
    def total(hidden, weight):
        out = token_statistics(hidden, weight, targets, temperature=temperature, implementation=name)
        return out.logprob.sum() + 0.5 * out.entropy.sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)
    return out, grads


def oracle(hidden, weight, targets, temperature):
    """Statistics, and the gradient of sum logprob + 0.5 entropy: d z = (1[target] - p) - 0.5 p (log p + H)."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    z = hidden @ weight / temperature
    lse = z.max(1) + np.log(np.exp(z - z.max(1, keepdims=True)).sum(1))
    logp = z - lse[:, None]
    p = np.exp(logp)
    entropy = -(p * logp).sum(1)
    d_z = np.eye(V)[targets] - p - 0.5 * p * (logp + entropy[:, None])
    return (logp[np.arange(N), targets], entropy, lse), (d_z @ weight.T / temperature, hidden.T @ d_z / temperature)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 60.0), st.floats(0.25, 4.0))
def test_implementations_agree_with_float64(seed, scale, temperature):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    weight = jnp.asarray(scale * rng.normal(size=(D, V)), jnp.float32)
    targets = rng.integers(0, V, N)
    wanted, wanted_grads = oracle(hidden, weight, targets, temperature)
    for name in NAMES:
        out, grads = run(hidden, weight, jnp.asarray(targets), jnp.float32(temperature), name)
        for a, b in zip(out, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, scale), err_msg=name)
        for a, b in zip(grads, wanted_grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * max(1, scale), err_msg=name)


def test_blocks_are_really_cut(monkeypatch):
    """The law above with the vocabulary in blocks of 128, so that chunked_xla has three."""
    monkeypatch.setattr(chunked_xla, "block_width", lambda *_: 128)
    jax.clear_caches()
    test_implementations_agree_with_float64()
    jax.clear_caches()
