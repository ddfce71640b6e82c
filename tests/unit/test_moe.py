"""The mixture of experts: against a dense layer, and its router's statistics and losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models import transformer
from rl_reason.models.moe import MixtureOfExperts, RouterStatistics, balance_loss, z_loss
from rl_reason.models.transformer import FeedForward
from tests.support import MOE, tiny_model, tiny_params

X = jax.random.normal(jax.random.key(0), (15, 8))
VALID = jnp.ones(15, bool)


def test_one_expert_is_a_dense_swiglu():
    dense, moe = tiny_model(), tiny_model(num_experts=1, experts_per_token=1)
    params = jax.tree.map(lambda x: x[0], tiny_params(dense)["layers"]["mlp"])
    experts = {name: params[name]["kernel"][None] for name in ("gate", "up", "down")}
    out, *_ = jax.jit(MixtureOfExperts(moe).apply)({"params": experts | {"router": jnp.zeros((8, 1))}}, X, VALID)
    np.testing.assert_allclose(out, jax.jit(FeedForward(dense).apply)({"params": params}, X), atol=1e-5)


def test_equals_a_loop_over_experts():
    model = tiny_model(**MOE)
    params = jax.tree.map(lambda x: x[0], tiny_params(model)["layers"]["moe"])
    out, router, _ = jax.jit(MixtureOfExperts(model).apply)({"params": params}, X, VALID)
    tokens, p = np.asarray(X).reshape(-1, 8), jax.tree.map(np.asarray, params)
    want, chosen = np.zeros_like(tokens), np.zeros(4)
    probabilities = np.asarray(jax.nn.softmax(tokens @ p["router"]))
    for token, probability, row in zip(tokens, probabilities, want, strict=True):
        best = np.argsort(-probability)[:2]
        for expert in best:
            gate = token @ p["gate"][expert]
            hidden = gate / (1 + np.exp(-gate)) * (token @ p["up"][expert])
            row += probability[expert] / probability[best].sum() * (hidden @ p["down"][expert])
            chosen[expert] += 1
    np.testing.assert_allclose(out.reshape(-1, 8), want, atol=1e-5)
    np.testing.assert_array_equal(router.chosen, chosen)
    np.testing.assert_allclose(router.probabilities, probabilities.sum(0), atol=1e-5)
    assert float(router.count) == 15


def test_losses_by_hand():
    # One layer, 4 tokens, 2 of 4 experts each. Even: f = p = 1/4: 4 * 4 * 1/16 = 1.
    even = RouterStatistics(jnp.full((1, 4), 1.0), jnp.full((1, 4), 2.0), jnp.array([8.0]), jnp.array([4.0]))
    assert float(balance_loss(even)) == pytest.approx(1.0)
    assert float(z_loss(even)) == pytest.approx(2.0)  # mean of squared logsumexp
    # Collapsed onto two experts with all the probability: f = p = 1/2, 1/2, 0, 0: 4 * (1/4 + 1/4) = 2.
    twice = RouterStatistics(
        jnp.array([[2.0, 2, 0, 0]]), jnp.array([[4.0, 4, 0, 0]]), jnp.array([8.0]), jnp.array([4.0])
    )
    assert float(balance_loss(twice)) == pytest.approx(2.0)
    # Two layers: their mean. No token: 0.
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), even, twice)
    assert float(balance_loss(both)) == pytest.approx(1.5)
    empty = jax.tree.map(jnp.zeros_like, even)
    assert float(balance_loss(empty)) == 0.0 and float(z_loss(empty)) == 0.0


def test_router_statistics_ignore_padding():
    model = tiny_model(**MOE)
    params = tiny_params(model)
    forward = jax.jit(lambda tokens, valid: transformer.forward(params, tokens, valid, model).router)
    valid = jnp.arange(5) < jnp.array([5, 3, 1])[:, None]
    tokens = jax.random.randint(jax.random.key(0), (3, 5), 3, 13)
    one, other = (forward(jnp.where(valid, tokens, filler), valid) for filler in (0, 7))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(one.count, [9.0, 9.0])  # 5 + 3 + 1, in each of two layers
    np.testing.assert_array_equal(one.chosen.sum(1), [18.0, 18.0])
    np.testing.assert_allclose(one.probabilities.sum(1), 9.0, rtol=1e-6)
