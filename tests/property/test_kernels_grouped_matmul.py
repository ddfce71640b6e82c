"""Every implementation of grouped_matmul agrees on random groups."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from kernels.grouped_matmul import grouped_matmul, pallas_tpu
from kernels.grouped_matmul.pallas_tpu import Tiles
from kernels.grouped_matmul.public import IMPLEMENTATIONS
from tests.support import portable

M, K, N, E = 200, 4, 3, 5


def both(lhs, rhs, sizes, name):
    out, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation=name), lhs, rhs)
    return out, *pull(jnp.cos(out))


def interpreted(lhs, rhs, sizes):
    """What ``both`` gives, by the TPU kernels."""
    options = dict(dtype=lhs.dtype, tiles=Tiles(32, K, N), interpret=True)
    out = pallas_tpu.product(lhs, rhs, sizes, transpose_rhs=False, **options)
    g = jnp.cos(out)
    d_lhs = pallas_tpu.product(g, rhs, sizes, transpose_rhs=True, **options | dict(tiles=Tiles(32, N, K)))
    return out, d_lhs, pallas_tpu.weight_gradient(lhs, g, sizes, **options)


COMPILED = {name: jax.jit(lambda a, b, s, name=name: both(a, b, s, name)) for name in portable(IMPLEMENTATIONS)}
COMPILED["pallas_tpu"] = jax.jit(interpreted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, M), min_size=E - 1, max_size=E - 1), st.integers(0, M), st.integers(0, 2**31))
def test_implementations_agree(cuts, used, seed):
    bounds = np.r_[0, np.sort(np.minimum(cuts, used)), used]
    sizes = jnp.asarray(np.diff(bounds), jnp.int32)
    rng = np.random.default_rng(seed)
    lhs, rhs = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(M, K), (E, K, N)])
    results = [run(lhs, rhs, sizes) for run in COMPILED.values()]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
