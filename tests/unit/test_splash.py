"""Attention on TPUs, in the Pallas interpreter, against attention by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import sharding
from rl_reason.models import splash
from rl_reason.models.attention import causal_attention

WIDTH, HEAD_DIM = 200, 128  # no multiple of a block


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    make = splash.splash.make_splash_mqa_single_device
    monkeypatch.setattr(splash.splash, "make_splash_mqa_single_device", functools.partial(make, interpret=True))
    monkeypatch.setattr(splash, "BLOCK", 128)


def drawn(rows, heads, kv_heads, width=WIDTH):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, width, h, HEAD_DIM)), jnp.float32) for h in (heads, kv_heads, kv_heads)]


def gradients(attend, arrays):
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    run = lambda *arrays: (attend(*arrays) * weights).sum()
    return jax.value_and_grad(run, (0, 1, 2))(*arrays)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "how",
    [
        dict(soft_cap=None, window=None),
        dict(soft_cap=3.0, window=None),
        dict(soft_cap=None, window=40),
    ],
    ids=["plain", "soft cap", "window"],
)
def test_is_causal_attention(how):
    arrays = drawn(2, 4, 2)
    how = how | dict(scale=0.07)
    got = gradients(lambda q, k, v: splash.attention(q, k, v, None, **how), arrays)
    want = gradients(lambda q, k, v: causal_attention(q, k, v, **how)[0], arrays)
    assert_same(got, want)


def test_segments_do_not_see_each_other():
    arrays, how = drawn(2, 2, 1), dict(scale=0.07, soft_cap=None, window=None)
    ends = jnp.array([[60], [150]])
    segments = jnp.where(jnp.arange(WIDTH) < ends, 1, 2)
    got = splash.attention(*arrays, segments, **how)
    np.testing.assert_allclose(got, causal_attention(*arrays, segments, **how)[0], atol=2e-5)
    assert not np.allclose(got, causal_attention(*arrays, **how)[0], atol=1e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (3, 1)], ids=["cut", "repeated", "whole"])
def test_a_mesh_cuts_rows_and_heads(heads, kv_heads):
    # Two devices each for rows and heads: key heads are cut, or repeated for each device, or all heads are everywhere.
    arrays, how = drawn(2, heads, kv_heads), dict(scale=0.07, soft_cap=None, window=None)
    want = gradients(lambda q, k, v: causal_attention(q, k, v, **how)[0], arrays)
    with jax.set_mesh(sharding.make_mesh(dict(data=2, fsdp=1, tensor=2, expert=1), jax.devices()[:4])):
        run = jax.jit(lambda *arrays: gradients(lambda q, k, v: splash.attention(q, k, v, None, **how), arrays))
        assert_same(run(*arrays), want)
