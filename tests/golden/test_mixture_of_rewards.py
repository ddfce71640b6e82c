"""Intern-S1's mixture of rewards by hand (arXiv:2508.15763)."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import mixture_of_rewards as mixture
from rl_reason.methods.mixture_of_rewards import JUDGE, PREFERENCE, RULE, TASK
from rl_reason.types import Prompts, Rollout

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

G = 3


def route(kinds, *, rule=None, task=None, label=None, preference=None, valid=None, truncated=None):
    """One group a kind; what is not given is a value that would show if it were read."""
    rows = G * len(kinds)
    array = lambda x, odd: jnp.full(rows, odd) if x is None else jnp.asarray(x)
    return mixture.route(
        jnp.repeat(jnp.array(kinds, jnp.int32), G),
        array(rule, 0.77),
        array(task, 0.77),
        array(label, -1),
        array(preference, jnp.nan),
        array(valid, True),
        array(truncated, False),
        G,
    )


def test_each_group_has_one_judge():
    rewards = route(
        [RULE, TASK, JUDGE, PREFERENCE],
        rule=[1.0, 0, 0.9] + [0.5] * 9,
        task=[0.5] * 3 + [1.0, 0.4, 0] + [0.5] * 6,
        label=[2] * 6 + [0, 1, 2] + [2] * 3,
        preference=[9.0] * 9 + [-0.5, -2.5, -4.5],
    )
    # Rules pass or fail: 0.9 fails. 2 * 0.4 - 1 = -0.2. A is right, B and C are wrong. Mean -2.5, std (ddof 1) 2.
    np.testing.assert_allclose(rewards.total, [1, -1, -1, 1, -0.2, -1, 1, -1, -1, 1, 0, -1], atol=1e-6)
    np.testing.assert_array_equal(rewards.correct, [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0])
    assert bool(rewards.valid.all())
    for name in mixture.KINDS:
        assert float(rewards.parts[f"by_{name}"].mean()) == 0.25


def test_other_judges_are_never_read():
    # NaN, unreadable labels and failed rules elsewhere change nothing: nothing is summed.
    clean = route([PREFERENCE], preference=[-0.5, -2.5, -4.5], valid=[False] * 3)
    np.testing.assert_allclose(clean.total, [1, 0, -1], atol=1e-6)
    assert bool(clean.valid.all())
    judged = route([JUDGE], label=[0, 1, 0], rule=[jnp.nan] * 3, valid=[False] * 3)
    np.testing.assert_array_equal(judged.total, [1, -1, 1])
    assert bool(judged.valid.all()) and bool(route([RULE], rule=[1.0, 0, 0]).valid.all())


def test_a_judge_that_cannot_be_read_has_not_judged():
    rewards = route([JUDGE], label=[0, -1, 3])
    assert rewards.valid.tolist() == [True, False, False]
    assert rewards.correct.tolist() == [1, 0, 0]


def test_a_preference_that_is_no_number_leaves_its_group():
    # The other two: mean -1.5, std sqrt(2): +-0.707107.
    rewards = route([PREFERENCE], preference=[-0.5, jnp.nan, -2.5])
    np.testing.assert_allclose(rewards.total, [0.707107, 0, -0.707107], atol=1e-6)
    assert rewards.valid.tolist() == [True, False, True]


def test_equal_preferences_and_one_alone_give_nothing():
    np.testing.assert_array_equal(route([PREFERENCE], preference=[0.1] * 3).total, 0.0)
    np.testing.assert_array_equal(route([PREFERENCE], preference=[0.1, jnp.inf, jnp.nan]).total, 0.0)


def test_groups_are_standardised_apart():
    # A preference model's scores are not comparable across prompts: a shift of one group changes nothing.
    first = route([PREFERENCE] * 2, preference=[1.0, 2, 3, 1, 2, 6])
    moved = route([PREFERENCE] * 2, preference=[1.0, 2, 3, 101, 102, 106])
    np.testing.assert_allclose(first.total, moved.total, atol=1e-5)


def test_an_unfinished_answer_is_wrong_whoever_passes_it():
    cut = [True, False, True]
    np.testing.assert_array_equal(route([JUDGE], label=[0, 0, 1], truncated=cut).total, [-1, 1, -1])
    np.testing.assert_array_equal(route([RULE], rule=[1.0, 1, 0], truncated=cut).total, [-1, 1, -1])
    np.testing.assert_allclose(route([PREFERENCE], preference=[3.0, 2, 1], truncated=cut).total, [1, 0, -1])


def asked(kinds, judges):
    """Two prompts of routes 0 and 1 with two samples each."""
    prompts = Prompts(
        tokens=jnp.ones((2, 2), jnp.int32),
        prompt_len=jnp.full(2, 2),
        example_id=jnp.arange(2),
        uid=jnp.arange(2),
        route=jnp.array([0, 1]),
    )
    zeros = jnp.zeros((4, 3))
    rollout = Rollout(
        tokens=jnp.ones((4, 3), jnp.int32),
        prompt_len=jnp.full(4, 2),
        completion_mask=jnp.ones((4, 3), bool),
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.array([0, 0, 1, 1]),
        truncated=jnp.zeros(4, bool),
        off_policy=jnp.zeros(4, bool),
    )
    score = jnp.array([1.0, 0, 1, 0])
    return mixture.reward(score, jnp.ones(4, bool), rollout, prompts, judges, kinds=kinds)


def test_the_slot_routes_by_task_and_asks_only_whom_it_needs():
    def never():
        raise AssertionError("asked for nothing")

    label = jnp.array([1, 1, 0, 0])
    rewards = asked(("rule", "judge"), {"judge": lambda: label, "preference": never})
    np.testing.assert_array_equal(rewards.total, [1, -1, 1, 1])
    np.testing.assert_array_equal(rewards.parts["verdict"], [1, 0, 1, 0])
    np.testing.assert_array_equal(rewards.parts["judge_differs"], [0, 0, 0, 1])
    preferred = asked(("preference", "rule"), {"preference": lambda: jnp.array([2.0, 1, 1, 2])})
    np.testing.assert_allclose(preferred.total, [0.707107, -0.707107, 1, -1], atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown \['rules'\]; there are rule, task, judge, preference"):
        asked(("rules", "judge"), {})
    with pytest.raises(ValueError, match=r"needs the models \['judge'\]: describe them in config.models"):
        asked(("rule", "judge"), {})
