"""Laws of the loop, over every config found in configs/: it builds and traces, and microbatches are invisible."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from rl_reason import build, rewards, slots
from rl_reason.batch import BatchPlan
from rl_reason.loop.chunk import make_chunk
from rl_reason.loop.update import Minibatch, apply_gradient, loss_and_gradient
from rl_reason.types import TrainState
from tests.support import (
    FLOAT64,
    MOE,
    config_names,
    configs_whose_objective,
    load_config,
    one_device,
    one_of_each,
    prompts_like,
    tiny_params,
    tiny_parts,
    way_of_losing,
)

CONFIGS, RL_CONFIGS = config_names(), config_names("rl")
LOSSES = one_of_each(RL_CONFIGS, way_of_losing)
ROWS, WIDTH = 8, 8


def keys_of(config):
    """Every key of a config with its children; slots and loss terms are open, their keys are a method's own."""
    open_keys = (*slots.OFFERED, "aggregation", "kl", "entropy", "token_reward", "models", "cohort")
    return {
        key: keys_of(value) if key not in open_keys and hasattr(value, "items") else None
        for key, value in config.items()
    }


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("name", CONFIGS)
def test_builds(name, arg):
    config = load_config(name, arg)
    experiment = build.build(config, one_device() if arg == "smoke" else None)  # bare: over all four devices
    assert experiment.parts.slots["objective"] is not None
    assert experiment.total_chunks * config.steps_per_call == config.num_steps
    assert keys_of(config) == keys_of(load_config("base", arg)), "only base.py adds keys"


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        (name, arg)
        for name in CONFIGS
        for arg in importlib.import_module(f"configs.{name}").ARGS
        if arg not in base.ARGS
    ],
)
def test_variants_build(name, arg):
    config = load_config(name, arg)
    assert build.build(config, one_device()).parts is not None
    assert config != load_config(name, ""), "a variant changes something"


@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_unknown_variants(name):
    with pytest.raises(ValueError, match="no variant 'smok'"):
        load_config(name, "smok")


@pytest.mark.parametrize("name", RL_CONFIGS)
def test_a_chunk_traces_and_returns_the_state_it_was_given(name):
    config = load_config(name)
    experiment = build.build(config, one_device())
    parts = experiment.parts
    verify = rewards.in_graph(
        experiment.train.names,
        experiment.tokenizer,
        group_size=parts.plan.group_size,
        completion_len=config.rollout.completion_len,
        answer_rule=experiment.answer_rule,
    )
    shape = (config.steps_per_call, parts.plan.prompts_drawn)

    def run(key):
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params_like)
        state = build.new_state(parts, params, 0)
        prompts = prompts_like(parts, (config.steps_per_call,))
        del key
        return state, make_chunk(parts, verify)(state, prompts, experiment.sampling)

    params_like = jax.eval_shape(lambda: build.init_params(experiment))
    before, (after, (metrics, sampled)) = jax.eval_shape(run, jax.random.key(0))
    assert isinstance(after, TrainState)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert describe(after) == describe(before)
    assert all(x.shape == shape[:1] and x.dtype == jnp.float32 for x in metrics.values())
    assert sampled.tokens.shape[0] == shape[0]


def rows_for(model, seed=0, *, old=True):
    """A minibatch of eight rows as an update sees it: one row without a token, one whose verifier failed."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(model.dtype)
    prompt_len = rng.integers(1, 3, ROWS)
    length = np.array([6, 5, 3, 0, 6, 2, 4, 1])
    column = np.arange(WIDTH)
    mask = (column >= prompt_len[:, None]) & (column < (prompt_len + length)[:, None])
    trained = mask & (np.arange(ROWS) != 4)[:, None]
    token_array = lambda x: jnp.asarray(np.where(mask, x, 0.0), dtype)
    logprobs = -2.5 + 0.2 * rng.normal(size=mask.shape)
    advantages = np.where(trained, rng.normal(size=(ROWS, 1)), 0.0)
    correct = jnp.asarray(rng.integers(0, 2, ROWS), dtype)
    return Minibatch(
        tokens=jnp.asarray(rng.integers(3, model.vocab_size, mask.shape), jnp.int32),
        prompt_len=jnp.asarray(prompt_len, jnp.int32),
        row_mask=jnp.asarray(mask),
        completion_mask=jnp.asarray(trained),
        rollout_logprobs=token_array(logprobs),
        advantages=token_array(advantages),
        rewards=correct,
        correct=correct,
        success_rate=jnp.full(ROWS, 0.5, dtype),
        off_policy=jnp.zeros(ROWS, bool),
        old_logprobs=token_array(logprobs + 0.05 * rng.normal(size=mask.shape)) if old else None,
        ref_logprobs=token_array(logprobs + 0.1 * rng.normal(size=mask.shape)),
        reference_mask=jnp.asarray(trained & (column > 5)),
        token_scores=token_array(rng.normal(size=mask.shape)),
    )


KL = dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0)
ENTROPY = dict(coef=0.01, how="seq_mean_token_mean", divisor=1.0)


def parts_for(name, model, microbatch_rows, **changes):
    """A config's parts around one layer, with KL, entropy and router terms on."""
    parts = tiny_parts(name, model | dict(num_layers=1))
    sizes = dict(prompts_per_step=4, minibatches=1, epochs=2, microbatch_rows=microbatch_rows)
    return dataclasses.replace(
        parts,
        plan=BatchPlan(**dataclasses.asdict(parts.plan) | sizes),
        regularisers=dict(kl=KL, entropy=ENTROPY),
        router_coefs=dict(balance=0.3, z=0.1),
        **changes,
    )


def gradient(parts, params, batch, key=0):
    run = jax.jit(lambda params, batch, key: loss_and_gradient(parts, params, batch, key, jnp.float32(0.8)))
    return run(params, batch, jax.random.key(key))


def assert_close(got, want, tolerance):
    """Loss and metrics each, gradients against their global norm."""
    loss, metrics, grads = got
    want_loss, want_metrics, want_grads = want
    assert float(loss) == pytest.approx(float(want_loss), rel=tolerance, abs=tolerance)
    assert set(metrics) == set(want_metrics)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(want_metrics[name]), rel=tolerance, abs=tolerance), name
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(want_grads)))
    assert norm > 1e-3
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * norm)


@pytest.mark.parametrize(
    "name, experts",
    [
        pytest.param(*name.values, experts, id=f"{name.values[0]}-{kind}", marks=[*name.marks, *marks])
        for name in LOSSES
        for kind, experts, marks in (
            ("dense", {}, []),
            ("moe", MOE, [] if name.values[0] == "clipcov" else [pytest.mark.slow]),  # the router is no objective's
        )
    ],
)
def test_microbatches_are_invisible_in_float64(name, experts, x64):
    # Denominators, covariances, selections and router balance are the minibatch's: 1 x 8 rows equals 4 x 2.
    model = FLOAT64 | experts
    parts = parts_for(name, model, 0)
    params, batch = tiny_params(parts.model), rows_for(parts.model)
    whole = gradient(parts, params, batch)
    if experts:
        assert {"router/balance_loss", "router/z_loss"} <= set(whole[1])
    assert_close(gradient(parts_for(name, model, 2), params, batch), whole, 1e-12)


def test_two_microbatches_in_fp32():
    # On the first and only update of a step, where the ratio is 1 by definition.
    whole = parts_for("base", {}, 0)
    params, batch = tiny_params(whole.model), rows_for(whole.model, old=False)
    halves = gradient(parts_for("base", {}, 4), params, batch)
    assert_close(halves, gradient(whole, params, batch), 1e-5)


def test_microbatch_scope_is_the_mean_over_microbatches(x64):
    # Parity with the authors' forks: microbatch i is rows i, i + 2, ... with a key of its own, each a batch by itself.
    name = "clipcov"  # a selection, so that it matters
    whole = parts_for(name, FLOAT64, 0)
    params, batch = tiny_params(whole.model), rows_for(whole.model)
    key = jax.random.key(0)
    run = jax.jit(lambda rows, key: loss_and_gradient(whole, params, rows, key, jnp.float32(0.8)))
    halves = [run(jax.tree.map(lambda x: x[i::2], batch), jax.random.fold_in(key, i)) for i in range(2)]  # noqa: B023
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    forked = gradient(parts_for(name, FLOAT64, 4, objective_scope="microbatch"), params, batch)
    assert_close(forked, mean, 1e-12)
    differs = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), forked[2], run(batch, key)[2])
    assert max(jax.tree.leaves(differs)) > 1e-3


def test_token_means_by_hand():
    # On policy each token's loss is -A: four tokens of A = -1 in row 0, one of A = 0 in row 1. The token mean is
    # 4 / 5 = 0.8; the mean of the two microbatches' token means is (1 + 0) / 2 = 0.5.
    def loss(scope):
        parts = parts_for("base", {}, 1, objective_scope=scope)
        parts = dataclasses.replace(parts, regularisers=dict(kl=None, entropy=None))
        sizes = dict(prompts_per_step=2, generated_prompts=2, group_size=1, train_group_size=1)
        parts = dataclasses.replace(parts, plan=BatchPlan(**dataclasses.asdict(parts.plan) | sizes))
        mask = jnp.zeros((2, WIDTH), bool).at[0, 2:6].set(True).at[1, 2].set(True)
        rows = dataclasses.replace(
            jax.tree.map(lambda x: x[:2], rows_for(parts.model, old=False)),
            prompt_len=jnp.array([2, 2]),
            row_mask=mask,
            completion_mask=mask,
            advantages=jnp.where(mask, jnp.array([[-1.0], [0.0]]), 0.0),
        )
        return float(gradient(parts, tiny_params(parts.model), rows)[0])

    assert loss("minibatch") == pytest.approx(0.8)
    assert loss("microbatch") == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name", one_of_each(configs_whose_objective(does_not_ask=["key"]), way_of_losing)
)  # a key draws by position
def test_what_lies_after_a_completion_is_invisible(name, x64):
    # Other padding, and five more columns of it: the same loss and gradient. Row 3 has no token at all.
    parts = parts_for(name, FLOAT64, 0)
    params, batch = tiny_params(parts.model), rows_for(parts.model)
    end = (batch.prompt_len + batch.row_mask.sum(1))[:, None]
    tokens = jnp.where(jnp.arange(WIDTH) < end, batch.tokens, 1)
    wide = {
        field.name: jnp.pad(x, ((0, 0), (0, 5)))
        for field in dataclasses.fields(batch)
        if (x := getattr(batch, field.name)) is not None and x.shape == (ROWS, WIDTH)
    }
    wide["tokens"] = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=9)
    want = gradient(parts, params, batch)
    assert_close(gradient(parts, params, dataclasses.replace(batch, **wide)), want, 1e-12)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_nothing_but_counters(broken):
    parts = tiny_parts("base", dict(num_layers=1))
    state = build.new_state(parts, tiny_params(parts.model), 0)
    run = jax.jit(lambda state, loss, grads: apply_gradient(parts, state, loss, grads))
    grads = jax.tree.map(jnp.ones_like, state.params)
    bad = grads | {"embed": grads["embed"].at[0, 0].set(jnp.nan)} if broken == "gradient" else grads
    loss = jnp.float32(jnp.inf if broken == "loss" else 0.0)

    skipped, metrics = run(run(state, loss, bad).state, loss, bad)
    assert float(metrics["actor/skipped_updates"]) == 1.0
    before, after = ((s.params, s.opt_state) for s in (state, skipped))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)
    assert {k: int(v) for k, v in skipped.stats.items()} == dict(skipped_updates=2, skipped_in_a_row=2, updates=0)

    good, _ = run(skipped, jnp.float32(0.0), grads)
    assert {k: int(v) for k, v in good.stats.items()} == dict(skipped_updates=2, skipped_in_a_row=0, updates=1)
    assert float(jnp.abs(good.params["embed"] - state.params["embed"]).max()) > 0
