"""The TPU kernel of token_statistics in TPU interpret mode, against float64 on full logits."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.entropy_covariance import pallas_tpu, token_statistics
from kernels.entropy_covariance.logits import Head
from kernels.entropy_covariance.pallas_tpu import Tiles, choose_tiles
from tests.interpreted import INTERPRET, no_races  # noqa: F401  watches every test here
from tests.unit.test_kernels_entropy_covariance import case, oracle

TILES = Tiles(16, 128, 8)


def kernel(hidden, unembedding, targets, temperature=1.0, soft_cap=None, vocab_size=None, tiles=TILES):
    head = Head(jnp.asarray(temperature, jnp.float32), soft_cap, vocab_size or unembedding.shape[1])
    return pallas_tpu.token_statistics(hidden, unembedding, targets, head, 1, 1, tiles=tiles, interpret=INTERPRET)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("tiles", [Tiles(16, 128, 20), Tiles(8, 256, 8), Tiles(48, 384, 16)], ids=str)
def test_matches_float64(dtype, tiles):
    # 37 rows of depth 20 and 300 columns: none of the blocks divides all three.
    args = case(rows=37, depth=20, dtype=dtype)
    got = kernel(*args, temperature=0.7, soft_cap=5.0, tiles=tiles)
    for a, b in zip(got, oracle(*args, temperature=float(np.float32(0.7)), soft_cap=5.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6)


def test_low_entropy_keeps_its_digits():
    gaps = jnp.array([1.0, 8.0, 17.0, 25.0, 35.0])
    hidden = jnp.stack([jnp.full(5, 40.0), 40.0 - gaps], 1)
    logprob, entropy, _ = kernel(hidden, jnp.eye(2), jnp.zeros(5, jnp.int32), tiles=Tiles(16, 128, 2))
    gap = np.asarray(gaps, np.float64)
    np.testing.assert_allclose(entropy, np.log1p(np.exp(-gap)) + gap * np.exp(-gap) / (1 + np.exp(-gap)), rtol=1e-5)
    np.testing.assert_allclose(logprob, -np.log1p(np.exp(-gap)), rtol=1e-5)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_and_tied_logits(scale):
    hidden, unembedding, targets = case(scale=scale)
    unembedding = unembedding.at[:, 200:].set(unembedding[:, 5:6])  # ties, across blocks
    got = kernel(hidden, unembedding, targets, temperature=0.7)
    for a, b in zip(got, oracle(hidden, unembedding, targets, float(np.float32(0.7))), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=2e-5 * scale)


def test_impossible_columns_padding_and_foreign_targets():
    """-inf logits add nothing, columns from vocab_size on are as if cut off, and who has no target has a finite logprob."""
    hidden, unembedding, targets = case()
    hidden, targets = jnp.abs(hidden), (targets % 250).at[0].set(-1)
    whole = unembedding.at[0, 7].set(-jnp.inf).at[:, 250:].set(jnp.nan)
    cut = oracle(hidden, jnp.delete(unembedding[:, :250], 7, axis=1), jnp.zeros_like(targets))
    got = kernel(hidden, whole, targets.at[1:].set(8), vocab_size=250)
    np.testing.assert_allclose(got[1], cut[1], rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(got[2], cut[2], rtol=3e-6, atol=3e-6)
    assert float(got[0][0]) == pytest.approx(-float(got[2][0]), rel=1e-6)


def test_gradients_are_those_of_the_meaning():
    args, weights = case(rows=16), np.random.default_rng(1).normal(size=(3, 16))

    def loss(run, hidden, unembedding):
        out = run(hidden, unembedding, args[2], temperature=0.7, soft_cap=5.0)
        return sum(jnp.vdot(x, w) for x, w in zip(out, weights, strict=True))

    got = jax.grad(functools.partial(loss, kernel), (0, 1))(*args[:2])
    reference = functools.partial(token_statistics, implementation="reference")
    for a, b in zip(got, jax.grad(functools.partial(loss, reference), (0, 1))(*args[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_what_it_does_not_take():
    args = case()
    with pytest.raises(
        ValueError, match='row_shards=2, vocab_shards=1, float32; use "chunked_xla", or call it in shard_map'
    ):
        token_statistics(*args, temperature=1.0, row_shards=2, implementation="pallas_tpu")


def test_lowers_for_a_tpu():
    run = jax.jit(functools.partial(token_statistics, temperature=1.0, implementation="pallas_tpu"))
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((256, 256), jnp.bfloat16), ((256, 1024), jnp.bfloat16), ((256,), jnp.int32))
    ]
    text = str(jax.export.export(run, platforms=["tpu"])(*shapes).mlir_module())
    assert text.count("tpu_custom_call") == 1 and "dot_general" not in text


@pytest.mark.parametrize("shape", [(16384, 2048, 151936), (16384, 4096, 153216), (13, 8, 300), (4096, 3584, 152064)])
def test_tiles_fit_and_cover(shape):
    rows, vocab, depth = choose_tiles(*shape, jnp.dtype("bfloat16"))
    assert 4 * depth * (rows + vocab) + 24 * rows * vocab <= pallas_tpu.VMEM_BYTES
    assert rows % 8 == 0 and vocab % 128 == 0 and shape[1] % depth == 0
