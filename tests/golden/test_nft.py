"""NFT by hand: losses, gradients, the straight-through floor, what it is on policy and where it goes (arXiv:2505.18116)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate
from rl_reason.methods import grpo, nft

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

AUTHORS = dict(neg_weight=1.0, normalize=1, eps=1.0, clamp_success_low=0.02, clamp_success_high=0.98)

# r = 0.25. A right row with R = 1 1.2 0.8 and a wrong one with R = 1 1.5 0.5, whose negative policy's ratio
# Q = (1 - 0.25 R) / 0.75 is 1, 0.833333, 1.166667.
R = jnp.array([[1.0, 1.2, 0.8, jnp.nan], [1.0, 1.5, 0.5, jnp.nan]])
MASK = jnp.array([[True] * 3 + [False]] * 2)
OLD = jnp.full((2, 4), -2.0)
CORRECT = jnp.array([1.0, 0.0])
RIGHT, WRONG = np.s_[0, :3], np.s_[1, :3]


def run(log_ratio, rate=0.25, **changes):
    """(losses, gradient of their sum over valid tokens, metrics)."""
    objective = functools.partial(nft.objective, **AUTHORS | changes)

    def total(logprobs):
        losses, metrics = objective(logprobs, OLD, CORRECT, jnp.full(2, rate), MASK)
        return jnp.where(MASK, losses, 0.0).sum(), (losses, metrics)

    grad, (losses, metrics) = jax.grad(total, has_aux=True)(OLD + log_ratio)
    return losses, grad, metrics


def test_losses_and_gradients():
    # w = 0.75. Right: -0.75 log R, gradient -0.75 whatever R. Wrong: -0.75 log max(Q, 1), gradient
    # 0.75 * (0.25 / 0.75) R / max(Q, 1) = 0.25 R / max(Q, 1): also where the floor makes the loss 0.
    losses, grad, metrics = run(jnp.log(R))
    np.testing.assert_allclose(losses[RIGHT], [0, -0.136741, 0.167358], atol=1e-6)
    np.testing.assert_allclose(losses[WRONG], [0, 0, -0.115613], atol=1e-6)
    np.testing.assert_allclose(grad[RIGHT], [-0.75] * 3, atol=1e-6)
    np.testing.assert_allclose(grad[WRONG], [0.25, 0.375, 0.107143], atol=1e-6)
    assert float(losses[1, 1]) == 0.0
    # (-0.136741 + 0.167358 - 0.115613) / 1000
    assert float(aggregate(losses, MASK, "sum", 1000.0)) == pytest.approx(-8.4996e-5, abs=1e-9)
    assert float(metrics["nft/floor_fraction"]) == pytest.approx(1 / 3)  # of the wrong tokens
    assert float(metrics["nft/positive_ratio"]) == pytest.approx(1.0)
    assert float(metrics["nft/negative_ratio"]) == pytest.approx(1.0)
    assert float(metrics["nft/positive_fraction"]) == pytest.approx(0.5)
    # -(log 1.2 + log 0.8 + log 1.5 + log 0.5) / 6 = 0.328504 / 6
    assert float(metrics["actor/ppo_kl"]) == pytest.approx(0.054751, abs=1e-6)
    assert float(metrics["actor/pg_clipfrac"]) == 0.0


@pytest.mark.parametrize(
    "normalize, right, wrong",
    [
        (0, -1.0, [1 / 3, 0.5, 0.142857]),  # w = 1: R / 3 / max(Q, 1)
        (2, -1.732051, [0.577350, 0.866025, 0.247436]),  # w = sqrt(0.75 / 0.25) = 1.732051
    ],
)
def test_prompt_weights(normalize, right, wrong):
    _, grad, _ = run(jnp.log(R), normalize=normalize)
    np.testing.assert_allclose(grad[RIGHT], [right] * 3, atol=1e-6)
    np.testing.assert_allclose(grad[WRONG], wrong, atol=1e-6)


def test_rft_learns_from_right_answers_alone():
    losses, grad, _ = run(jnp.log(R), neg_weight=0.0)
    np.testing.assert_array_equal(losses[WRONG], 0.0)
    np.testing.assert_array_equal(grad[WRONG], 0.0)
    np.testing.assert_allclose(grad[RIGHT], [-0.75] * 3, atol=1e-6)
    np.testing.assert_allclose(run(jnp.log(R), neg_weight=0.5)[1][WRONG], [0.125, 0.1875, 0.053571], atol=1e-6)


def test_floor():
    # eps 0.1 binds nowhere: at R = 1.5 the loss is -0.75 log 0.833333 and the gradient 0.25 * 1.5 / 0.833333 = 0.45.
    losses, grad, metrics = run(jnp.log(R), eps=0.1)
    assert float(losses[1, 1]) == pytest.approx(0.136741, abs=1e-6)
    assert float(grad[1, 1]) == pytest.approx(0.45, abs=1e-6)
    assert float(metrics["nft/floor_fraction"]) == 0.0
    # R = 5: Q = -0.333333 is floored to 0.5: loss -0.75 log 0.5 = 0.519860, gradient 0.25 * 5 / 0.5 = 2.5.
    losses, grad, _ = run(jnp.log(jnp.full((2, 4), 5.0)), eps=0.5)
    np.testing.assert_allclose(losses[WRONG], 0.519860, atol=1e-6)
    np.testing.assert_allclose(grad[WRONG], 2.5, atol=1e-5)


def test_log_ratios_stop_at_ten():
    # Right: -0.75 * 10 and no gradient. Wrong: Q is some -7000 (at r = 0.98 some -1e6), the floor holds exactly.
    for rate in (0.25, 0.98):
        losses, grad, metrics = run(jnp.full((2, 4), 12.0), rate=rate)
        np.testing.assert_allclose(losses[RIGHT], -(1 - rate) * 10, rtol=1e-5)
        np.testing.assert_array_equal(losses[WRONG], 0.0)
        np.testing.assert_array_equal(grad, 0.0)
        assert float(metrics["actor/pg_clipfrac"]) == 1.0
    losses, grad, _ = run(jnp.full((2, 4), -50.0))  # R = 0: Q = 4 / 3, and nothing left to push down
    np.testing.assert_allclose(losses[WRONG], -0.75 * np.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(grad[WRONG], 0.0, atol=1e-9)
    np.testing.assert_allclose(grad[RIGHT], -0.75, rtol=1e-6)


@pytest.mark.parametrize("rate, right, wrong", [(0.0, -0.98, 0.02), (1.0, -0.02, 0.98), (0.5, -0.5, 0.5)])
def test_success_rates_are_clamped(rate, right, wrong):
    # On policy and normalize 1 the gradients are -(1 - r) and r. A filter should have dropped groups with r = 0 or 1;
    # here they are finite: an all-wrong group is pushed down by 0.02 a token, an all-right one pulled up by 0.02.
    losses, grad, _ = run(jnp.zeros((2, 4)), rate=rate)
    np.testing.assert_array_equal(losses[:, :3], 0.0)
    np.testing.assert_allclose(grad[RIGHT], right, rtol=1e-5)
    np.testing.assert_allclose(grad[WRONG], wrong, rtol=1e-5)


@pytest.mark.parametrize("right", range(1, 8))
@pytest.mark.parametrize("normalize", [1, 2])
def test_on_policy_gradient_is_that_of_group_advantages(right, normalize, x64):
    # R = 1: -w for right and w r / (1 - r) for wrong tokens. normalize 1: -(1 - r) and r, the negative of c - r, which is
    # Dr.GRPO's advantage of a 0/1 reward. normalize 2 divides by sqrt(r (1 - r)), the population's deviation.
    correct = (jnp.arange(8) < right).astype(jnp.float64)
    logprobs = -jax.random.exponential(jax.random.key(right), (8, 3), jnp.float64)
    mask = jnp.ones((8, 3), bool)
    rate = jnp.full(8, right / 8)
    objective = functools.partial(nft.objective, **AUTHORS | dict(normalize=normalize))
    grad = jax.grad(lambda lp: objective(lp, logprobs, correct, rate, mask)[0].sum())(logprobs)
    group = grpo.advantages(correct[None], jnp.ones((1, 8), bool), divide_by_std=normalize == 2, ddof=0, std_eps=0.0)
    np.testing.assert_allclose(grad, np.repeat(-group.T, 3, axis=1), rtol=0, atol=1e-12)
    # verl's unbiased deviation is larger: its advantages are sqrt(7 / 8) of these.
    unbiased = grpo.advantages(correct[None], jnp.ones((1, 8), bool), divide_by_std=True, ddof=1, std_eps=0.0)
    if normalize == 2:
        np.testing.assert_allclose(unbiased, group * np.sqrt(7 / 8), atol=1e-12)


@functools.cache
def tabular(terms, steps):
    """A softmax over five answers, two of them right, after ``steps`` of exact gradient descent on the expected loss."""
    start = jnp.array([0.3, -0.5, 0.8, 0.0, -1.0])
    correct = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0])
    old = jax.nn.log_softmax(start)
    rate = jnp.full(5, (jnp.exp(old) * correct).sum())
    weight = jnp.exp(old) * jnp.where(correct > 0, "positive" in terms, "negative" in terms)
    hypers = dict(neg_weight=1.0, normalize=0, eps=1e-3, clamp_success_low=1e-6, clamp_success_high=1 - 1e-6)

    def loss(logits):
        logprobs = jax.nn.log_softmax(logits)[:, None]
        losses, _ = nft.objective(logprobs, old[:, None], correct, rate, jnp.ones((5, 1), bool), **hypers)
        return (weight * losses[:, 0]).sum()

    descend = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, x: x - jax.grad(loss)(x), start))
    policy = jax.nn.softmax(descend(steps))
    positive = jnp.exp(old) * correct / rate
    return float(jnp.abs(policy - positive).sum() / 2), float((policy * (1 - correct)).sum())


def test_tabular(x64):
    # The optimum of both terms together, and of the positive alone, is pi+ = old [right] / r, in total variation; the
    # negatives get there sooner. Alone they empty the wrong answers too, and leave the right ones where they end up.
    distance, wrong_mass = tabular(("positive", "negative"), 4000)
    assert distance < 1e-3 and wrong_mass < 1e-3
    rft_distance, _ = tabular(("positive",), 4000)
    assert distance < rft_distance < 2e-2
    assert tabular(("positive", "negative"), 20)[1] < tabular(("positive",), 20)[1]
    alone_distance, alone_wrong = tabular(("negative",), 4000)
    assert alone_wrong < 1e-3 and alone_distance > 1e-2


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(neg_weight=-1.0), r"neg_weight=-1\.0: 1 is NFT, 0 is RFT\. Below 0 the authors run DAPO"),
        (dict(normalize=3), r"normalize=3: 0 is no weight, 1 is 1 - r, 2 is"),
        (dict(eps=0.0), r"eps=0\.0 must be above 0"),
        (dict(clamp_success_low=0.0), r"clamp_success_low=0\.0, clamp_success_high=0\.98: want 0 < low"),
        (dict(clamp_success_high=1.0), "want 0 < low <= high < 1"),
        (dict(clamp_success_low=0.6, clamp_success_high=0.4), "want 0 < low <= high < 1"),
    ],
)
def test_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        run(jnp.zeros((2, 4)), **changes)


def test_nothing_to_train_on():
    losses, metrics = nft.objective(OLD, OLD, CORRECT, jnp.zeros(2), jnp.zeros((2, 4), bool), **AUTHORS)
    assert bool(jnp.isfinite(losses).all()) and all(float(v) == 0 for v in metrics.values())
