"""One seeded step of every config: its updates from a fixed rollout, in float64 and by plain SGD, pinned.

Parameters, tokens and verdicts are numpy's and the optimizer is the test's, so the numbers hang on the config's slots,
the loop and the model. After a change that is meant to move them, copy those that the failure prints.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reason import build
from rl_reason.loop.step import update_phase
from rl_reason.sampling import make_sampling
from rl_reason.types import Rewards, Rollout
from tests.support import COMPLETION_LEN, FLOAT64, PROMPT_WIDTH, config_names, tiny_params, tiny_parts, tiny_prompts

PINNED = json.loads(pathlib.Path(__file__).with_name("steps.json").read_text())
PROMPTS, GROUP = 4, 4


def rollout_and_rewards(seed=0):
    """Four groups of four: two mixed, one all right, one with a broken verifier."""
    rng, rows = np.random.default_rng(seed), PROMPTS * GROUP
    prompts = tiny_prompts(PROMPTS)
    prompt_len = np.repeat(np.asarray(prompts.prompt_len), GROUP)
    length = rng.integers(1, COMPLETION_LEN + 1, rows)
    column = np.arange(PROMPT_WIDTH + COMPLETION_LEN)
    mask = (column >= prompt_len[:, None]) & (column < (prompt_len + length)[:, None])
    tokens = np.where(column < (prompt_len + length)[:, None], rng.integers(3, 13, mask.shape), 0)
    logprobs = jnp.asarray(np.where(mask, -2.5 + 0.2 * rng.normal(size=mask.shape), 0.0))
    rollout = Rollout(
        tokens=jnp.asarray(tokens, jnp.int32),
        prompt_len=jnp.asarray(prompt_len, jnp.int32),
        completion_mask=jnp.asarray(mask),
        rollout_logprobs=logprobs,
        sampled_logprobs=logprobs,
        prompt_id=jnp.repeat(jnp.arange(PROMPTS, dtype=jnp.int32), GROUP),
        truncated=jnp.zeros(rows, bool),
        off_policy=jnp.zeros(rows, bool),
    )
    score = jnp.array([1.0, 0, 0, 1] + [1.0, 0, 0, 0] + [1.0] * 4 + [0.0, 1, 1, 0])
    return rollout, Rewards(total=score, correct=score, valid=jnp.arange(rows) != 13)


@pytest.mark.parametrize("name", config_names("rl"))
def test_a_step(name, x64):
    plan = dict(prompts_per_step=PROMPTS, group_size=GROUP, train_group_size=GROUP, generated_prompts=PROMPTS)
    parts = tiny_parts(name, FLOAT64 | dict(num_layers=1), **plan)
    rate = optax.constant_schedule(0.1)
    # The tiny model's gradients are larger than a real one's: none is skipped for its norm.
    parts = dataclasses.replace(parts, optimizer=optax.sgd(rate), schedule=rate, skip_above_norm=0.0)
    params = tiny_params(parts.model)
    state = build.new_state(parts, params, seed=0)
    rollout, rewards = rollout_and_rewards()
    run = jax.jit(lambda state: update_phase(parts, state, rollout, rewards, make_sampling(1.0)))
    after, metrics, keep = run(state)

    assert int(after.step) == 1 and int(after.stats["updates"]) == parts.plan.updates_per_step
    if parts.slots["selection"] is None:
        assert int(keep.sum()) == 15
    else:  # how many is pinned, as training/trained_fraction
        assert 0 < int(keep.sum()) <= 15
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, params)
    assert min(jax.tree.leaves(moved)) > 0, "a parameter that no gradient reaches"
    norm = float(optax.tree.norm(jax.tree.map(jnp.subtract, after.params, params)))
    got = {"update_norm": norm} | {k: float(v) for k, v in metrics.items()}
    assert all(np.isfinite(v) for v in got.values())
    assert name in PINNED, f'new config: add to steps.json "{name}": {json.dumps(got, indent=1)}'
    pinned = {k: got.get(k) for k in PINNED[name]}  # a metric more moves nothing
    assert pinned == pytest.approx(PINNED[name], rel=1e-7, abs=1e-12), f'"{name}": {json.dumps(got, indent=1)}'


def test_pins_name_configs_that_exist():
    assert set(PINNED) == set(config_names("rl"))
