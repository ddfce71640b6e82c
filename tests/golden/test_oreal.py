"""OREAL by hand (arXiv:2502.06781), after the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate, token_set
from rl_reason.methods import oreal

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# Four completions of one prompt, two right: RLOO of +-1 is 4/3 (R - 0) = +-1.333333.
LOGPROBS = jnp.array([[-0.5, -1.0, 0.0], [-0.2, -0.4, -0.6], [-1.0, -2.0, 0.0], [-0.3, 0.0, 0.0]])
REF = jnp.array([[-0.6, -0.9, 0.0], [-0.2, -0.5, -0.6], [-1.0, -1.8, 0.0], [-0.3, 0.0, 0.0]])
MASK = jnp.arange(3) < jnp.array([2, 3, 2, 1])[:, None]
REWARDS = jnp.array([1.0, 1.0, -1.0, -1.0])
ADVANTAGES = jnp.where(MASK, 4 / 3 * REWARDS[:, None], 0.0)
OVER = {"positive": "positive", "negative": "negative", "kl": "completion"}
COEF = {"positive": 1.0, "negative": 0.5, "kl": 0.01}


def run(logprobs=LOGPROBS, scores=None, weights="none", mask=MASK):
    return oreal.objective(logprobs, REF, ADVANTAGES, REWARDS, scores, mask, token_weights=weights)


def reduced(logprobs=LOGPROBS, **kwargs):
    terms, _ = run(logprobs, **kwargs)
    over = lambda name: token_set(OVER[name], MASK, REWARDS, jnp.zeros(4, bool))
    return {name: COEF[name] * aggregate(x, over(name), "token_mean") for name, x in terms.items()}


def test_the_worked_example():
    # Positive: 4/3 (0.5 + 1 + 0.2 + 0.4 + 0.6) / 5 = 0.72. Negative: 0.5 * 4/3 * 3 / 3. KL: k3 of d = 0.1, -0.1, 0, 0.1, 0,
    # 0, -0.2, 0 is 0.004837, 0.005171, 0, 0.004837, 0, 0, 0.021403, 0: 0.01 * 0.036248 / 8.
    got = reduced()
    assert float(got["positive"]) == pytest.approx(0.72, abs=1e-6)
    assert float(got["negative"]) == pytest.approx(0.666667, abs=1e-6)
    assert float(got["kl"]) == pytest.approx(0.0000453, abs=1e-7)
    assert float(sum(got.values())) == pytest.approx(1.386712, abs=1e-6)


def test_gradients():
    # Positive tokens: -A / 5. Negative: -A / 3 * 0.5, as the ratio is 1 but has a slope. KL: 0.01 (1 - e^-d) / 8 for each.
    grads = {name: jax.grad(lambda lp, n=name: reduced(lp)[n])(LOGPROBS) for name in OVER}
    right = np.asarray(MASK) & (np.asarray(REWARDS) > 0)[:, None]
    wrong = np.asarray(MASK) & ~right
    np.testing.assert_allclose(grads["positive"], np.where(right, -4 / 15, 0), atol=1e-6)
    np.testing.assert_allclose(grads["negative"], np.where(wrong, 4 / 18, 0), atol=1e-6)
    kl = 0.01 * (1 - np.exp(-np.asarray(LOGPROBS - REF))) / 8
    np.testing.assert_allclose(grads["kl"], np.where(MASK, kl, 0), atol=1e-8)


@pytest.mark.parametrize(
    "weights, right, wrong",
    [
        # Running means of 0, 2, -2, 1 are 0, 1, 0, 0.25; 2 sigmoid(w) - 1 is 0.462117 at 1 and 0.124353 at 0.25.
        ("running_mean", [0, 0.462117, 0, 0.124353], [0, 0, 0, 0]),
        ("tokenwise", [0, 0.761594, 0, 0.462117], [0, 0, 0.761594, 0]),
        ("none", [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_token_weights(weights, right, wrong):
    scores, mask = jnp.array([[0.0, 2.0, -2.0, 1.0, 9.0]]), jnp.array([[True] * 4 + [False]])
    ones = jnp.ones((1, 5))
    terms, metrics = oreal.objective(-ones, -ones, ones, jnp.ones(1), scores, mask, token_weights=weights)
    np.testing.assert_allclose(terms["positive"][0, :4], right, atol=1e-6)
    np.testing.assert_allclose(-terms["negative"][0, :4], wrong, atol=1e-6)
    assert float(metrics["oreal/positive_live_fraction"]) == pytest.approx(np.mean(np.array(right) > 0))


def test_the_running_mean_begins_with_the_completion():
    # The prompt's columns come first and are not of the completion: they count for nothing.
    scores, mask = jnp.array([[50.0, 2.0, 0.0]]), jnp.array([[False, True, True]])
    ones = jnp.ones((1, 3))
    terms, _ = oreal.objective(-ones, -ones, ones, jnp.ones(1), scores, mask, token_weights="running_mean")
    np.testing.assert_allclose(terms["positive"][0, 1:], [0.761594, 0.462117], atol=1e-6)


def test_no_gradient_reaches_the_token_scores():
    grad = jax.grad(lambda s: reduced(scores=s, weights="running_mean")["positive"])(0.3 * jnp.ones((4, 3)))
    np.testing.assert_array_equal(grad, 0.0)


def test_refusals():
    with pytest.raises(ValueError, match="there are running_mean, tokenwise, none"):
        run(weights="mean")
    with pytest.raises(ValueError, match=r"set config\.token_reward, or token_weights='none'"):
        run(weights="tokenwise")


def test_one_right_and_one_wrong_of_every_mixed_group():
    correct = jnp.array([[1.0, 0, 0, 1], [1.0, 1, 1, 1], [0.0, 0, 0, 0], [0.0, 1, 0, 0]])
    valid = jnp.ones((4, 4), bool).at[3, 1].set(False)  # the only right one of the last group cannot be used
    seen = np.zeros((4, 4))
    for seed in range(200):
        keep, stats = oreal.one_of_each(correct, valid, jax.random.key(seed))
        assert keep.sum(1).tolist() == [2, 0, 0, 0] and stats == {}
        assert float(correct[0][keep[0]].sum()) == 1.0
        seen += np.asarray(keep)
    assert (seen[0] > 70).all()  # each of the four in about half of the draws: below 70 of 200 by chance once in 10^5
