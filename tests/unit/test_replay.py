"""Experts chosen at rollout and used again in the update's forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import build
from rl_reason.loop.step import sample_phase, update_phase
from rl_reason.models import moe
from rl_reason.models.score import score
from rl_reason.rollout import generate
from rl_reason.sampling import make_sampling
from rl_reason.types import Rewards
from tests.support import FLOAT64, MOE, load_config, one_device, tiny_params, tiny_parts, tiny_prompts

RECORD = dict(record_experts=True)


def drawn(**model):
    """(parts, params, rollout) of a tiny mixture in float64, with what its routers chose."""
    parts = tiny_parts("base", FLOAT64 | MOE | model, RECORD)
    params = tiny_params(parts.model)
    run = jax.jit(lambda params: generate(params, tiny_prompts(4), jax.random.key(0), make_sampling(1.0), parts.model,
                                          parts.rollout)[0])  # fmt: skip
    return parts, params, run(params)


def scores(parts, params, rollout, expert_ids):
    rows = (rollout.tokens, rollout.prompt_len, rollout.completion_mask, jnp.float64(1.0))
    static = (parts.model, parts.rollout.completion_len)
    run = jax.jit(lambda params, ids: score(params, *rows, *static, ids))
    return run(params, expert_ids)


def test_replayed_weights_by_hand():
    # softmax(0, log 2, log 3) = 1/6, 2/6, 3/6. Its own two best are 2 and 1; the record says 0 and 2: 1/4 and 3/4.
    logits = jnp.log(jnp.array([[1.0, 2.0, 3.0]] * 2))
    own = jnp.array([[2, 1], [2, 1]])
    weights, ids = moe.replay(logits, own, jnp.array([[0, 2], [-1, -1]]))
    assert ids.tolist() == [[0, 2], [2, 1]]
    np.testing.assert_allclose(weights, [[0.25, 0.75], [0.6, 0.4]], atol=1e-6)
    # d/dl_0 of w_0 = w_0 (1 - w_0) = 3/16, and the expert that did not act gets nothing.
    slope = jax.grad(lambda x: moe.replay(x, own, jnp.array([[0, 2], [-1, -1]]))[0][0, 0])(logits)
    np.testing.assert_allclose(slope[0], [3 / 16, 0, -3 / 16], atol=1e-6)


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_same_weights_choose_the_same(scanned, x64):
    parts, params, rollout = drawn(scan_layers=scanned, scan_decode=scanned)
    ids = rollout.expert_ids
    assert ids.shape == (len(rollout.tokens), parts.model.num_layers * 2, rollout.tokens.shape[1])
    # Recorded from the last prompt token on, up to the one before the last drawn.
    column = jnp.arange(rollout.tokens.shape[1])
    length = rollout.completion_mask.sum(1)
    fed = (column >= rollout.prompt_len[:, None] - 1) & (column < (rollout.prompt_len + length)[:, None] - 1)
    np.testing.assert_array_equal((ids >= 0).all(1), fed)
    np.testing.assert_array_equal((ids >= 0).any(1), fed)
    own, replayed = scores(parts, params, rollout, None), scores(parts, params, rollout, ids)
    np.testing.assert_allclose(replayed.logprobs, own.logprobs, atol=1e-12)
    np.testing.assert_allclose(replayed.logprobs, rollout.rollout_logprobs, atol=1e-9)
    np.testing.assert_array_equal(replayed.router.chosen, own.router.chosen)


def test_other_weights_use_the_recorded_experts(x64):
    parts, params, rollout = drawn()
    router = params["layers"]["moe"]["router"]
    layers = params["layers"] | {"moe": params["layers"]["moe"] | {"router": -router}}  # prefers what it disliked
    turned = params | {"layers": layers}
    own, replayed = (scores(parts, turned, rollout, ids) for ids in (None, rollout.expert_ids))
    assert float(jnp.abs(own.logprobs - replayed.logprobs).max()) > 1e-3
    # Tokens that are fed count for the recorded experts; the others, prompts and last ones, choose for themselves.
    ids = rollout.expert_ids.reshape(len(rollout.tokens), parts.model.num_layers, 2, -1)
    one_hot = jax.nn.one_hot(ids, 4).sum((0, 2, 3))
    ends = (rollout.prompt_len + rollout.completion_mask.sum(1)).sum()
    fed = rollout.completion_mask.sum()
    np.testing.assert_array_equal(one_hot.sum(1), [2 * fed] * parts.model.num_layers)
    assert bool((replayed.router.chosen >= one_hot).all())
    np.testing.assert_allclose(replayed.router.chosen.sum(1), [2.0 * ends] * parts.model.num_layers)


def test_a_step_with_replay(x64):
    # On policy it changes nothing, in one microbatch or in two; the first of several updates replays too.
    prompts, after = tiny_prompts(4), {}
    for name, record, microbatch in (("own", False, 0), ("replayed", True, 0), ("in pieces", True, 2)):
        rollout = dict(record_experts=record)
        parts = tiny_parts(
            "base", FLOAT64 | MOE | dict(num_layers=1), rollout, minibatches=1, microbatch_rows=microbatch
        )
        state = build.new_state(parts, tiny_params(parts.model), 0)
        score_of = jnp.array([1.0, 0, 1, 0, 1, 0, 1, 1])
        rewards = Rewards(total=score_of, correct=score_of, valid=jnp.ones(8, bool))

        def step(state, parts=parts, rewards=rewards):
            drawn, _ = sample_phase(parts, state, prompts, make_sampling(1.0))
            return update_phase(parts, state, drawn, rewards, make_sampling(1.0))[0].params

        after[name] = jax.jit(step)(state)
    for name in ("replayed", "in pieces"):
        for x, y in zip(jax.tree.leaves(after["own"]), jax.tree.leaves(after[name]), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-9)


def test_the_config_switches_it_on_and_refuses_what_cannot_be():
    config = load_config("base")
    config.model.update(num_experts=4, experts_per_token=2)
    assert not build.build(config, one_device()).parts.rollout.record_experts
    config.router.replay = True
    assert build.build(config, one_device()).parts.rollout.record_experts
    dense = load_config("base")
    dense.router.replay = True
    with pytest.raises(ValueError, match=r"needs a mixture of experts: set config\.model\.num_experts"):
        build.build(dense, one_device())
    shown = load_config("luffy")
    shown.model.update(num_experts=4, experts_per_token=2)
    shown.router.replay = True
    with pytest.raises(ValueError, match="demonstrations were not sampled"):
        build.build(shown, one_device())
