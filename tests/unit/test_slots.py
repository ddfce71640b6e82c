"""Slots: asking by name is the switch, hyperparameters come from the config alone, errors name the cure."""

import functools
import inspect
import re

import jax.numpy as jnp
import pytest

from configs.common import call
from rl_reason import slots
from rl_reason.methods import grpo

GRPO = dict(clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)


def resolve(slot, fn, **hypers):
    return slots.resolve(slot, call(fn, **hypers).to_dict())


def test_resolves_and_calls_with_what_it_asks_for():
    slot = resolve("advantages", "grpo.advantages", divide_by_std=False, ddof=1, std_eps=0.0)
    assert slot.wants == {"rewards", "valid"}
    offered = dict(rewards=jnp.array([[1.0, 0.0]]), valid=jnp.ones((1, 2), bool), keep="never looked at")
    assert slot(offered).tolist() == [[0.5, -0.5]]
    assert isinstance(slot.fn, functools.partial) and slot.fn.func is grpo.advantages


@pytest.mark.parametrize(
    "slot, fn, hypers, says",
    [
        (
            "objective",
            "grpo.objective",
            dict(clip_eps_low=0.2, clip_eps_hihg=0.2),
            "missing ['clip_eps_high', 'dual_clip_ratio'], unknown ['clip_eps_hihg']. Did you mean 'clip_eps_high'?",
        ),
        ("objective", "grpo.objective", {}, "takes exactly ['clip_eps_high', 'clip_eps_low', 'dual_clip_ratio']"),
        ("objective", "grpo.objective", GRPO | dict(zebra=1), "missing [], unknown ['zebra']. Hyperparameters"),
        ("objective", "gropo.objective", GRPO, "no module rl_reason/methods/gropo.py. Did you mean 'grpo'?"),
        ("objective", "grpo.objectiv", GRPO, "grpo has no function 'objectiv'. Did you mean 'objective'?"),
        ("objective", "grpo", GRPO, "grpo has no function ''. It has: advantages, advantages_with_kl, objective."),
        ("objective", "grpo.ppo_losses", GRPO, "grpo has no function 'ppo_losses'"),  # imported there, not its own
        (
            "correction",
            "grpo.objective",
            GRPO,
            "asks for ['advantages', 'logprobs']; the correction slot offers ['completion_mask', ",
        ),
    ],
)
def test_refuses(slot, fn, hypers, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        resolve(slot, fn, **hypers)


def test_slots_of_the_preference_loop_are_named_by_their_keys_and_asked_of_nobody_else():
    slot = resolve("pair_objective", "dpo.objective", loss_type="sigmoid", beta=0.1, label_smoothing=0.0)
    assert slot.wants == slots.OFFERED["pair_objective"]
    assert resolve("instructions", "air.instruction_keep", max_variance=1.5, ddof=0).wants == {"scores"}
    rules = dict(min_margin=2.0, max_margin=3.0, min_chosen_score=8.0, mix_policies=True)
    assert resolve("pairs", "air.pick", **rules).wants == slots.OFFERED["pairs"]
    with pytest.raises(
        ValueError, match=r"config\.preference\.objective = call\('dpo\.objective', \.\.\.\): missing \['beta'"
    ):
        resolve("pair_objective", "dpo.objective", loss_type="sigmoid")


def test_lists_the_methods_there_are():
    with pytest.raises(ValueError, match=r"There are: .*clip_cov, .*grpo, .*kl_cov"):
        resolve("objective", "zzz.objective")


def test_only_some_slots_may_be_left_out():
    config = dict.fromkeys(slots.OFFERED)
    with pytest.raises(ValueError, match=r"config\.reward is None; only \['baseline', 'correction', 'selection'\]"):
        slots.resolve_all(config)
    config["reward"] = call("verdict.reward", right=1.0, wrong=0.0).to_dict()
    config["advantages"] = call("grpo.advantages", divide_by_std=True, ddof=1, std_eps=1e-6).to_dict()
    config["objective"] = call("grpo.objective", **GRPO).to_dict()
    resolved = slots.resolve_all(config)
    assert resolved["selection"] is None and resolved["correction"] is None and resolved["objective"] is not None


def test_a_default_in_code_would_be_ignored_by_nobody():
    # The signature is the only list of hyperparameters: what it names, the config must give.
    names = [p.name for p in inspect.signature(grpo.objective).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert sorted(names) == sorted(GRPO)
