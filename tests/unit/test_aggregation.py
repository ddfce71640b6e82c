"""From token losses to one number."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import term
from rl_reason.aggregation import HOW, OVER, aggregate, check, token_set

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# Rows of 3, 1, 0 and 2 tokens; what is off the mask is NaN. Row sums 6, 4, -, 11.
MASK = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
LOSSES = jnp.where(MASK, jnp.array([[1.0, 2, 3], [4, 0, 0], [0, 0, 0], [5, 6, 0]]), jnp.nan)
REWARDS = jnp.array([1.0, 0.0, 1.0, -1.0])
OFF_POLICY = jnp.array([False, False, False, True])


@pytest.mark.parametrize(
    "how, value",
    [
        ("token_mean", 21 / 6),
        ("seq_mean_token_mean", (2 + 4 + 5.5) / 3),  # the empty row is no row
        ("seq_mean_token_sum", (6 + 4 + 11) / 3),
        ("sum", 21.0),
    ],
)
@pytest.mark.parametrize("divisor", [1.0, 8.0])
def test_how(how, value, divisor):
    assert float(aggregate(LOSSES, MASK, how, divisor)) == pytest.approx(value / divisor)


@pytest.mark.parametrize(
    "over, rows",
    [
        ("completion", [1, 1, 1, 1]),
        ("positive", [1, 0, 1, 0]),
        ("negative", [0, 1, 0, 1]),  # a reward of 0 is not positive
        ("on_policy", [1, 1, 1, 0]),
        ("off_policy", [0, 0, 0, 1]),
    ],
)
def test_over(over, rows):
    np.testing.assert_array_equal(token_set(over, MASK, REWARDS, OFF_POLICY), MASK & (np.array(rows) > 0)[:, None])


def test_every_over_is_tested_and_completions_split_in_two():
    for pair in (("positive", "negative"), ("on_policy", "off_policy")):
        a, b = (token_set(over, MASK, REWARDS, OFF_POLICY) for over in pair)
        np.testing.assert_array_equal(a ^ b, MASK)
    np.testing.assert_array_equal(token_set("reference", MASK, REWARDS, OFF_POLICY), False)
    marked = jnp.tile(jnp.array([False, True, False]), (4, 1))  # the middle column; off the mask it does not count
    expected = [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    np.testing.assert_array_equal(token_set("reference", MASK, REWARDS, OFF_POLICY, marked), expected)
    assert set(OVER) == {"completion", "positive", "negative", "on_policy", "off_policy", "reference"}


@pytest.mark.parametrize("how", HOW)
def test_an_empty_set_gives_zero_and_zero_gradient(how):
    value, grad = jax.value_and_grad(lambda x: aggregate(x, jnp.zeros_like(MASK), how))(LOSSES)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("how", HOW)
def test_laws(how):
    value = aggregate(LOSSES, MASK, how)
    np.testing.assert_array_equal(aggregate(4 * LOSSES, MASK, how), 4 * value)  # linear; exact for a power of two
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(aggregate(LOSSES[order], MASK[order], how), value, rtol=1e-6)
    wide = jnp.pad(LOSSES, ((0, 2), (0, 5)), constant_values=jnp.nan)
    np.testing.assert_allclose(aggregate(wide, jnp.pad(MASK, ((0, 2), (0, 5))), how), value, rtol=1e-6)
    grad = jax.grad(lambda x: aggregate(x, MASK, how))(LOSSES)
    np.testing.assert_array_equal(grad[~MASK], 0.0)
    assert bool((grad[MASK] > 0).all())


def test_check():
    check({f"{how}_{over}": term(how, over=over).to_dict() for how, over in itertools.product(HOW, OVER)})
    good = term("sum", divisor=1000.0).to_dict()
    for bad, says in (
        (good | dict(how="mean"), r"aggregation\.policy\.how='mean'; there are token_mean, "),
        (good | dict(over="rows"), r"policy\.over='rows'; there are completion, "),
        (good | dict(divisor=0.0), r"policy\.divisor=0\.0 must be above 0"),
        (good | dict(scale=1.0), "takes exactly coef, divisor, how, over"),
        ({"how": "sum"}, "takes exactly coef, divisor, how, over"),
    ):
        with pytest.raises(ValueError, match=says):
            check({"policy": bad})
    with pytest.raises(ValueError, match="there are token_mean"):
        aggregate(LOSSES, MASK, "mean")
