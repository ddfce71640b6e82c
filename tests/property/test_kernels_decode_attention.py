"""Every implementation of decode_attention agrees with a loop in float64 on random lengths, prompts and windows."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from kernels.decode_attention import decode_attention
from kernels.decode_attention.public import IMPLEMENTATIONS
from tests.support import portable
from tests.unit.test_kernels_decode_attention import oracle

B, S, KV, H, HD, Q, PROMPT = 5, 9, 2, 4, 8, 3, 6
NAMES = portable(IMPLEMENTATIONS)


@functools.partial(jax.jit, static_argnames="name")
def run(queries, keys, values, lengths, prompt, window, name):
    return decode_attention(queries, keys, values, lengths=lengths, window=window, implementation=name, **prompt)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, S), min_size=B, max_size=B),
    st.lists(st.integers(1, PROMPT), min_size=Q, max_size=Q),
    st.lists(st.integers(0, Q - 1), min_size=B, max_size=B),
    st.integers(1, S + PROMPT + 1),
)
def test_implementations_agree_with_float64(seed, lengths, lens, index, window):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = draw(B, H, HD), draw(B, S, KV, HD), draw(B, S, KV, HD), jnp.asarray(lengths, jnp.int32)
    prompt = dict(
        prompt_keys=draw(Q, PROMPT, KV, HD),
        prompt_values=draw(Q, PROMPT, KV, HD),
        prompt_lens=jnp.asarray(lens, jnp.int32),
        prompt_index=jnp.asarray(index, jnp.int32),
    )
    wanted = oracle(*arrays, prompt, window=window)
    for name in NAMES:
        out = run(*arrays, prompt, jnp.int32(window), name)
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
