"""Whole numbers in kernels, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.integers import div, in_order, ranks, rem


def test_division_is_towards_zero():
    x = jnp.array([0, 1, 6, 7, 8, -1, -7, -8])
    assert div(x, 7).tolist() == [0, 0, 0, 1, 1, 0, -1, -1]
    assert rem(x, 7).tolist() == [0, 1, 6, 0, 1, -1, 0, -1]


@pytest.mark.parametrize("size, kinds", [(1, 1), (9, 3), (200, 7), (64, 1000)])
def test_ranks_are_those_of_a_stable_sort(size, kinds):
    keys = np.random.default_rng(size).integers(-kinds, kinds, size).astype(np.int32)
    order = np.argsort(keys, kind="stable")
    rank = ranks(jnp.asarray(keys))
    np.testing.assert_array_equal(rank, np.argsort(order, kind="stable"))
    np.testing.assert_array_equal(in_order(rank, jnp.asarray(keys)), keys[order])
