"""Which gradients an update takes: not those that are too large, and none for what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reason import build, learning
from rl_reason.loop.partition import split
from rl_reason.loop.update import apply_gradient
from rl_reason.sharding import path_name
from tests.support import MOE, load_config, one_device, tiny_params, tiny_parts

FROZEN = ("router",)


def setting(model=MOE, **changes):
    parts = dataclasses.replace(tiny_parts("base", dict(model) | dict(num_layers=1)), **changes)
    state = build.new_state(parts, tiny_params(parts.model), 0)
    run = jax.jit(lambda state, loss, grads: apply_gradient(parts, state, loss, grads))
    ones = jax.tree.map(jnp.ones_like, split(state.params, parts.frozen)[0])
    unit = jax.tree.map(lambda g: g / optax.tree.norm(ones), ones)  # a gradient of norm 1
    return state, run, unit


def paths(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def scaled(factor, tree):
    return jax.tree.map(lambda g: factor * g, tree)


def test_a_gradient_above_the_norm_is_skipped_and_counted():
    state, run, unit = setting(skip_above_norm=0.3)
    after, metrics = run(state, jnp.float32(0.0), scaled(0.31, unit))
    assert float(metrics["actor/skipped_updates"]) == 1.0
    assert float(metrics["actor/grad_norm"]) == pytest.approx(0.31, rel=1e-5)
    for x, y in zip(jax.tree.leaves((state.params, state.opt_state)),
                    jax.tree.leaves((after.params, after.opt_state)), strict=True):  # fmt: skip
        np.testing.assert_array_equal(x, y)
    # Not one of the broken updates in a row that stop a run.
    assert {k: int(v) for k, v in after.stats.items()} == dict(skipped_updates=1, skipped_in_a_row=0, updates=0)
    good, metrics = run(after, jnp.float32(0.0), scaled(0.29, unit))
    assert float(metrics["actor/skipped_updates"]) == 0.0
    assert {k: int(v) for k, v in good.stats.items()} == dict(skipped_updates=1, skipped_in_a_row=0, updates=1)


def test_broken_updates_in_a_row_are_counted_apart():
    state, run, unit = setting(skip_above_norm=0.3)
    state, _ = run(state, jnp.float32(jnp.nan), scaled(0.1, unit))
    state, _ = run(state, jnp.float32(0.0), scaled(jnp.inf, unit))
    assert int(state.stats["skipped_in_a_row"]) == 2
    state, _ = run(state, jnp.float32(0.0), scaled(5.0, unit))  # finite, though too large
    assert {k: int(v) for k, v in state.stats.items()} == dict(skipped_updates=3, skipped_in_a_row=0, updates=0)


def test_zero_skips_nothing():
    state, run, unit = setting(skip_above_norm=0.0)
    after, metrics = run(state, jnp.float32(0.0), scaled(1e6, unit))
    assert float(metrics["actor/skipped_updates"]) == 0.0 and int(after.stats["updates"]) == 1


def moved(before, after):
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(change)}


def test_what_is_frozen_stays_decay_included():
    o = load_config("base").optimizer.to_dict() | dict(weight_decay=0.1)
    schedule = optax.constant_schedule(0.1)
    state, run, unit = setting(frozen=FROZEN, optimizer=learning.adamw(o, schedule), schedule=schedule)
    after, _ = run(state, jnp.float32(0.0), unit)
    after, _ = run(after, jnp.float32(0.0), unit)
    change = moved(state.params, after.params)
    assert change.pop("layers/moe/router") == 0.0
    assert min(change.values()) > 0.01


def test_what_is_frozen_costs_neither_gradient_nor_moments():
    state, _, unit = setting(frozen=FROZEN)
    router = "layers/moe/router"
    assert router in paths(state.params)
    assert paths(unit) == [path for path in paths(state.params) if path != router]
    assert not any(path.endswith(router) for path in paths(state.opt_state))
    assert sum(path.endswith("layers/moe/gate") for path in paths(state.opt_state)) == 2  # Adam's moments


def test_the_warm_up_freezes_and_skips_nothing():
    config = load_config("base")
    config.model.update(num_experts=4, experts_per_token=2)
    config.optimizer.update(frozen=FROZEN, skip_above_norm=0.3)
    experiment = build.build(config, one_device())
    assert experiment.parts.frozen == FROZEN and experiment.parts.skip_above_norm == 0.3
    assert experiment.supervised.frozen == () and experiment.supervised.skip_above_norm == 0.0


@pytest.mark.parametrize(
    "frozen, message",
    [
        (("router",), r"'router' matches no parameter \(a dense model has no router: set model.num_experts\)"),
        (("attn",), "'attn' matches no parameter; there are embed, final_norm, layers/attention/k/kernel"),
        (("",), "leaves no parameter to learn"),
    ],
)
def test_refusals(frozen, message):
    config = load_config("base")
    config.optimizer.frozen = frozen
    with pytest.raises(ValueError, match=message):
        build.build(config, one_device())
