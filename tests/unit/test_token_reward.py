"""The token reward model: its loss by hand, that it learns, and that padding and other rows do not show."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reason.loop import token_reward
from rl_reason.loop.token_reward import Rows, TokenReward
from rl_reason.models import reward_head
from tests import support

MODEL = support.tiny_model(num_layers=1)
STATIC = TokenReward(MODEL, optax.adam(3e-2))
MASK = jnp.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], bool)
ROWS = Rows(
    tokens=jnp.array([[5, 7, 8, 2], [6, 2, 0, 0], [5, 0, 0, 0], [4, 5, 9, 2]]),
    mask=MASK,
    prompt_len=jnp.array([1, 1, 1, 2]),
)


@pytest.fixture(scope="module")
def state():
    return STATIC.init(jax.random.key(1), support.tiny_params(MODEL))


def test_scores_are_the_heads_logits_on_completions_alone(state):
    got = token_reward.scores(STATIC, state["params"], ROWS, 1)
    np.testing.assert_array_equal(got[~MASK], 0.0)
    assert bool((got[MASK] != 0).all())
    np.testing.assert_allclose(token_reward.scores(STATIC, state["params"], ROWS, 2), got, atol=1e-6)
    padded = ROWS._replace(tokens=jnp.where(ROWS.valid, ROWS.tokens, 11))
    np.testing.assert_allclose(token_reward.scores(STATIC, state["params"], padded, 1), got, atol=1e-6)


def test_loss_by_hand(state, monkeypatch):
    # Mean logits 1 and -2, right and wrong: (log(1 + e^-1) + log(1 + e^-2)) / 2 = (0.313262 + 0.126928) / 2. The last row's
    # verifier failed, the empty row is not learned from.
    logits = jnp.array([[9.0, 0, 1, 2], [9.0, -2, 9, 9], [9.0] * 4, [9.0] * 4])
    monkeypatch.setattr(reward_head, "token_logits", lambda *_: logits)
    right, learned = jnp.array([1.0, 0, 1, 1]), jnp.array([True, True, False, False])
    value, metrics = token_reward.loss(STATIC, state["params"], ROWS, right, learned)
    assert float(value) == pytest.approx((0.313262 + 0.126928) / 2, abs=1e-6)
    assert float(metrics["token_reward/accuracy"]) == 1.0
    value, _ = token_reward.loss(STATIC, state["params"], ROWS, right, jnp.zeros(4, bool))
    assert float(value) == 0.0


def test_it_learns_to_tell_right_from_wrong(state):
    right, learned = jnp.array([1.0, 0, 1, 0]), jnp.array([True, True, False, True])
    step = jax.jit(lambda state: token_reward.update(STATIC, state, ROWS, right, learned, 1))
    losses = []
    for _ in range(40):
        state, metrics = step(state)
        losses.append(float(metrics["token_reward/loss"]))
    assert losses[-1] < 0.2 * losses[0] and float(metrics["token_reward/accuracy"]) == 1.0


def test_pieces_show_nowhere(state):
    """Also where one of them has fewer rows to learn from, or none."""
    right = jnp.array([1.0, 0, 1, 0])
    for learned in (jnp.array([True, True, False, True]), jnp.array([True, False, True, False])):
        whole, told = token_reward.update(STATIC, state, ROWS, right, learned, 1)
        for pieces in (2, 4):
            got, measured = token_reward.update(STATIC, state, ROWS, right, learned, pieces)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), measured, told)
            # Adam's first step is 0.03 along a sign: moments, which are in proportion to the gradient, are compared.
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
            jax.tree.map(close, got["opt_state"], whole["opt_state"])


def test_a_gradient_that_is_not_finite_changes_nothing(state):
    right = jnp.array([jnp.nan, 0, 1, 0])
    new, _ = token_reward.update(STATIC, state, ROWS, right, jnp.ones(4, bool), 2)
    jax.tree.map(np.testing.assert_array_equal, new, state)
