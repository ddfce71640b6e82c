"""select_top_fraction and select_random_subset: the edges, by hand."""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.entropy_covariance import select_random_subset, select_top_fraction
from kernels.entropy_covariance.selection import fraction_of


def picked(values, mask, fraction):
    values, mask = jnp.asarray([values], jnp.float32), jnp.asarray([mask], bool)
    return np.flatnonzero(jax.jit(select_top_fraction)(values, mask, fraction)).tolist()


def test_ties_zeros_infinities_and_nan():
    nan, inf = float("nan"), float("inf")
    assert picked([1, 3, 3, 3], [1, 1, 1, 1], 0.5) == [1, 2]
    assert picked([-0.0, 0.0, -1, -1], [1, 1, 1, 1], 0.25) == [0]  # +0 and -0 are equal
    assert picked([nan, -inf, -inf, 2], [1, 1, 1, 1], 0.5) == [1, 3]
    assert picked([nan, nan, nan, 2], [1, 1, 1, 1], 1.0) == [3]  # NaN counts, and is never selected
    assert picked([nan, nan], [1, 1], 1.0) == []
    assert picked([inf, 9, 1, 2], [0, 0, 1, 1], 0.0) == [3]  # at least one
    assert picked([5, 4, 3, 2], [0, 0, 0, 0], 1.0) == []
    assert picked([1e-45, 0, -1e-45, -1], [1, 1, 1, 1], 0.25) == [0]  # subnormals are told apart


@pytest.mark.parametrize("text", ["0.1", "0.29", "0.57", "0.0002", "0.002", "0.2", "0.7", "0.999", "1.0", "0.3333"])
@pytest.mark.parametrize("x64", [False, True])
def test_fraction_is_the_decimal_that_was_written(text, x64):
    counts = np.unique(np.r_[np.arange(1, 3000), 10_000, 32_768, 50_000, 99_999])
    exact = [fractions.Fraction(text) * int(c) for c in counts]
    with jax.enable_x64(x64):
        for fraction in (float(text), jnp.asarray(float(text))):
            got = jax.jit(lambda f, c: jax.vmap(lambda c: fraction_of(f, c))(c))(
                fraction, jnp.asarray(counts, jnp.int32)
            )
            assert got.tolist() == [int(x) for x in exact]


def test_a_third_of_thirty_is_ten():
    assert picked(np.arange(30), np.ones(30), 1 / 3) == list(range(20, 30))


def test_random_subset_takes_the_highest_scores_of_the_candidates():
    scores = jnp.array([[0.9, 0.1, 0.8], [0.7, 0.8, 0.2]])
    candidates = jnp.array([[False, True, True], [True, True, True]])
    take = jax.jit(select_random_subset)
    assert np.flatnonzero(take(candidates, 2, scores)).tolist() == [2, 4]
    assert np.flatnonzero(take(candidates, jnp.int32(1), scores)).tolist() == [2]
    assert np.array_equal(take(candidates, 99, scores), candidates)
    assert not take(candidates, 0, scores).any()
    assert not take(candidates, -3, scores).any()


@pytest.mark.parametrize("num_values", [3, 10**6])
def test_shards_agree_with_one_device(num_values):
    """Few distinct values: ties are settled across shards, in the order of their rows."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    axes = ("data", "fsdp")
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(0, num_values, (8, 7)), jnp.float32)
    mask = jnp.asarray(rng.random((8, 7)) < 0.7)
    for fraction in (0.03, 0.2, 0.55, 1.0):
        expected = select_top_fraction(values, mask, fraction)
        sharded = jax.shard_map(
            functools.partial(select_top_fraction, axis_names=axes),
            mesh=mesh,
            in_specs=(P(axes), P(axes), P()),
            out_specs=P(axes),
        )
        assert np.array_equal(jax.jit(sharded)(values, mask, jnp.float32(fraction)), expected)
        placed = jax.device_put((values, mask), jax.NamedSharding(mesh, P(axes)))
        compiled = jax.jit(select_top_fraction).lower(*placed, fraction).compile()
        assert np.array_equal(compiled(*placed, fraction), expected)
        assert " all-gather(" not in compiled.as_text()
