"""Attention of long rows, block by block, is attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models import attention
from rl_reason.models.attention import causal_attention

ROWS, WIDTH, HEADS, KV, SIZE = 2, 61, 4, 2, 8


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(window=5, segments=True),
        dict(window=40, soft_cap=2.0, scale=0.3),
        dict(window=jnp.int32(7), segments=True),
    ],
    ids=["plain", "narrow window, packed", "wide window, soft cap", "traced window, packed"],
)
def test_blocks_change_nothing(how, monkeypatch):
    """Values and gradients, in float64; 61 queries are no multiple of any block."""
    rng = np.random.default_rng(0)
    how = dict(how)
    if how.pop("segments", False):
        how["segments"] = jnp.asarray(np.sort(rng.integers(0, 4, (ROWS, WIDTH)), axis=1))

    def run(q, k, v):
        out, _ = causal_attention(q, k, v, **how)
        return (out * jnp.cos(jnp.arange(SIZE))).sum(), out

    with jax.enable_x64(True):
        qkv = tuple(jnp.asarray(rng.normal(size=(ROWS, WIDTH, heads, SIZE))) for heads in (HEADS, KV, KV))
        gradient = lambda: jax.jit(jax.grad(lambda *qkv: run(*qkv), (0, 1, 2), has_aux=True))(*qkv)  # traced anew
        whole = gradient()
        monkeypatch.setattr(attention, "LONG_ROW", 8)
        monkeypatch.setattr(attention, "SCORES_BYTES", 4 * HEADS * WIDTH * 16)
        blocks = gradient()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-12), blocks, whole)


def test_scores_of_a_long_row_are_never_whole():
    shape = lambda heads: jax.ShapeDtypeStruct((1, 8192, heads, 64), jnp.bfloat16)
    attend = jax.grad(lambda q, k, v: causal_attention(q, k, v)[0].astype(jnp.float32).sum(), (0, 1, 2))
    memory = jax.jit(attend).lower(shape(8), shape(2), shape(2)).compile().memory_analysis()
    assert memory is not None
    assert (
        memory.temp_size_in_bytes < 6 * attention.SCORES_BYTES
    )  # a block's scores, and what its gradient makes of them
