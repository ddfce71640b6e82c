"""DPO's losses by hand: one worked pair, initialisation, slopes, lengths, extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import dpo

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def pair(chosen, rejected, ref_chosen, ref_rejected, chosen_len, rejected_len, repeat=1):
    floats = [jnp.full((repeat,), x, jnp.float32) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    return (*floats, jnp.full((repeat,), chosen_len), jnp.full((repeat,), rejected_len))


# Chosen -20 against the reference's -22 over 10 tokens, rejected -30 against -27 over 20:
# Delta = 2 - (-3) = 5, Delta' = 2 / 10 - (-3 / 20) = 0.35.
WORKED = pair(-20.0, -30.0, -22.0, -27.0, 10, 20)


def loss(arrays, loss_type="sigmoid", beta=0.1, label_smoothing=0.0):
    return dpo.objective(*arrays, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)


def slopes(arrays, **options):
    """d loss / d (chosen, rejected) log-probability of each pair."""
    return jax.grad(lambda c, r: loss((c, r, *arrays[2:]), **options)[0].sum(), argnums=(0, 1))(*arrays[:2])


@pytest.mark.parametrize(
    "options, value",
    [
        (dict(loss_type="sigmoid"), 0.474077),  # -log sigma(0.5) = log(1 + e^-0.5) = log 1.606531
        (dict(loss_type="ipo"), 21.622500),  # (0.35 - 5)^2
        (dict(loss_type="sigmoid_norm"), 0.675800),  # log(1 + e^-0.035) = log 1.965605
        (dict(loss_type="sigmoid_norm", beta=5.0), 0.160224),  # log(1 + e^-1.75) = log 1.173774
        (dict(loss_type="hinge"), 0.5),  # 1 - 0.5
        # log sigma(-0.5) = -0.974077; (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8 = 0.329262 / 0.8
        (dict(loss_type="robust", label_smoothing=0.1), 0.411577),
        (dict(loss_type="robust", label_smoothing=0.0), 0.474077),  # no flips expected: sigmoid
    ],
)
def test_worked_pair(options, value):
    assert float(loss(WORKED, **options)[0][0]) == pytest.approx(value, abs=2e-6)


def test_metrics_of_the_worked_pair():
    # Implicit rewards 0.1 * 2 and 0.1 * -3, the same for every loss type; logps are the policy's own.
    for loss_type in dpo.LOSS_TYPES:
        metrics = {name: float(x) for name, x in loss(WORKED, loss_type)[1].items()}
        expected = {"rewards/chosen": 0.2, "rewards/rejected": -0.3, "rewards/margins": 0.5, "rewards/accuracies": 1.0}
        assert metrics == pytest.approx(expected | {"logps/chosen": -20.0, "logps/rejected": -30.0})


def test_accuracy_counts_pairs_and_a_tie_is_wrong():
    arrays = [jnp.concatenate(x) for x in zip(WORKED, WORKED, WORKED, WORKED, strict=True)]
    arrays[0] = arrays[0].at[1].set(-30.0).at[2].set(-25.0)  # Delta 5, -5, 0, 5: two of four are above 0
    assert float(loss(arrays)[1]["rewards/accuracies"]) == 0.5


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_values_at_initialisation(beta):
    # Policy = reference, so Delta = 0: log 2; 1 / (4 beta^2) (25 at beta 0.1); 1; and for robust
    # [(1 - eps) log 2 - eps log 2] / (1 - 2 eps) = log 2.
    start = pair(-20.0, -30.0, -20.0, -30.0, 10, 20)
    value = lambda *args: float(loss(start, *args)[0][0])
    assert value("sigmoid", beta) == pytest.approx(math.log(2)) == value("sigmoid_norm", beta)
    assert value("ipo", beta) == pytest.approx(1 / (4 * beta**2))
    assert value("hinge", beta) == 1.0
    assert value("robust", beta, 0.2) == pytest.approx(math.log(2))
    assert float(loss(start)[1]["rewards/accuracies"]) == 0.0


def test_slope_is_minus_beta_sigma_of_minus_the_margin():
    # -0.1 sigma(-0.5) = -0.1 * 0.377541 for the chosen sum, its negative for the rejected one.
    chosen, rejected = slopes(WORKED)
    np.testing.assert_allclose([chosen[0], rejected[0]], [-0.037754, 0.037754], atol=1e-6)
    # At Delta = 0 it is -beta / 2, and it falls as the margin grows: pairs with a large gap saturate first.
    by_margin = [float(slopes(pair(x, 0.0, 0.0, 0.0, 1, 1))[0][0]) for x in (0.0, 10.0, 20.0, 40.0)]
    # sigma(-1) = 0.268941, sigma(-2) = 0.119203, sigma(-4) = 0.017986
    np.testing.assert_allclose(by_margin, [-0.05, -0.0268941, -0.0119203, -0.0017986], rtol=1e-4)


def test_slopes_of_the_other_losses():
    # ipo: 2 (Delta' - 5) = -9.3 a token mean, so -0.93 for a sum over 10 tokens and +0.465 for one over 20.
    np.testing.assert_allclose([x[0] for x in slopes(WORKED, loss_type="ipo")], [-0.93, 0.465], rtol=1e-5)
    np.testing.assert_allclose([x[0] for x in slopes(WORKED, loss_type="hinge")], [-0.1, 0.1], rtol=1e-6)
    # robust: [-(0.9) beta sigma(-0.5) - 0.1 beta sigma(0.5)] / 0.8 = -(0.0339787 + 0.0062246) / 0.8
    robust = slopes(WORKED, loss_type="robust", label_smoothing=0.1)
    np.testing.assert_allclose([x[0] for x in robust], [-0.0502541, 0.0502541], rtol=1e-5)


def test_sigmoid_norm_scales_by_one_over_length():
    # Delta' = 0 at both lengths: slope -beta / 2 a token mean, -beta / (2 len) a token; sigmoid does not know of lengths.
    for length in (1, 10, 40):
        start = pair(-20.0, -30.0, -20.0, -30.0, length, 2 * length)
        chosen, rejected = slopes(start, loss_type="sigmoid_norm")
        np.testing.assert_allclose([chosen[0], rejected[0]], [-0.05 / length, 0.025 / length], rtol=1e-6)
        np.testing.assert_allclose([x[0] for x in slopes(start)], [-0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("loss_type", dpo.LOSS_TYPES)
def test_a_completion_without_tokens_has_ratio_zero(loss_type):
    # Chosen is empty: Delta = 0 - (-3), Delta' = 0.15, whatever its sums hold; and it gets no gradient.
    for junk in (0.0, -7.0, jnp.nan):
        empty = pair(junk, -30.0, -1.0, -27.0, 0, 20)
        delta = 0.15 if loss_type in dpo.PER_TOKEN else 3.0
        expected = dpo.pair_losses(jnp.array([delta]), loss_type=loss_type, beta=0.1, label_smoothing=0.0)
        np.testing.assert_allclose(loss(empty, loss_type)[0], expected, rtol=1e-6)
        chosen, rejected = slopes(empty, loss_type=loss_type)
        assert float(chosen[0]) == 0.0 and np.isfinite(rejected[0]) and float(rejected[0]) > 0.0
    both = pair(0.0, 0.0, 0.0, 0.0, 0, 0)
    assert all(np.isfinite(x).all() for x in (loss(both, loss_type)[0], *slopes(both, loss_type=loss_type)))


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "robust"])
@pytest.mark.parametrize("delta", [1e4, -1e4, 1e15, -1e15])
def test_huge_margins_stay_finite(loss_type, delta):
    smoothing = 0.1 if loss_type == "robust" else 0.0
    far = pair(delta, 0.0, 0.0, 0.0, 1, 1)
    value = float(loss(far, loss_type, 1.0, smoothing)[0][0])
    slope = float(slopes(far, loss_type=loss_type, beta=1.0, label_smoothing=smoothing)[0][0])
    # Delta -> -inf: -Delta, slope -1 (robust: -(0.9 Delta) / 0.8, slope -1.125). Delta -> inf: 0 (robust: -0.1 Delta / 0.8).
    share = {True: (0.0, 0.125), False: (1.0, 1.125)}[delta > 0][loss_type == "robust"]
    assert value == pytest.approx(-share * delta, rel=1e-3) and slope == pytest.approx(-share)


def test_the_reference_gets_no_gradient():
    grad = jax.grad(lambda ref: loss((*WORKED[:2], ref, *WORKED[3:]))[0].sum())(WORKED[2])
    np.testing.assert_array_equal(grad, 0.0)


def test_swapping_chosen_and_rejected():
    # log sigma(x) = x + log sigma(-x), so loss(-Delta) - loss(Delta) = beta Delta = 0.5.
    swapped = [WORKED[i] for i in (1, 0, 3, 2, 5, 4)]
    assert float(loss(swapped)[0][0] - loss(WORKED)[0][0]) == pytest.approx(0.5)


def test_robust_is_unbiased_under_flips():
    # Flip each label with probability eps: (1 - eps) robust(Delta) + eps robust(-Delta) = sigmoid(Delta).
    eps = 0.3
    robust = functools.partial(dpo.pair_losses, loss_type="robust", beta=0.1, label_smoothing=eps)
    sigmoid = functools.partial(dpo.pair_losses, loss_type="sigmoid", beta=0.1, label_smoothing=0.0)
    delta = jnp.array([-8.0, 0.0, 3.0, 20.0])
    np.testing.assert_allclose((1 - eps) * robust(delta) + eps * robust(-delta), sigmoid(delta), rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_type="sigmod"), "there are sigmoid, ipo"),
        (dict(beta=0.0), "beta=0.0 must be above 0"),
        (dict(label_smoothing=0.1), "acts on loss_type='robust' only, and this is 'sigmoid'"),
        (dict(loss_type="ipo", label_smoothing=0.1), "set it to 0"),
        (dict(loss_type="robust", label_smoothing=0.5), r"must lie in \[0, 0.5\)"),
        (dict(loss_type="robust", label_smoothing=-0.1), r"must lie in \[0, 0.5\)"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss(WORKED, **options)
