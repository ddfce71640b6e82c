"""Laws of the loop: however a step is composed or cut, it trains the same weights on the same tokens."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import rewards
from rl_reason.checkpoint import Checkpoints, host_copy
from rl_reason.loop.chunk import make_chunk, make_step
from rl_reason.loop.engine import Fused, Split
from rl_reason.loop.step import sample_phase
from rl_reason.slots import Slot
from rl_reason.types import Verdicts
from tests import support
from tests.e2e import loops

TOLERANCE = 1e-10  # of parameters, float64
STEPS = 3
SHAPE = dict(group_size=4, train_group_size=4, minibatches=2)  # of four prompts


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Everything here is in double precision but the run that learns."""
    with jax.enable_x64(True):
        yield


@functools.cache
def parts_of(config: str = "clipcov", **plan):
    """Double precision, and all groups handed out. Groups of four: some will differ in reward, whatever is drawn."""
    parts = support.tiny_parts(config, model=support.FLOAT64 | dict(num_layers=1), **SHAPE | plan)
    return dataclasses.replace(parts, log_groups=-1)


def with_slot(parts, name: str, fn, *wants: str):
    """The same parts with one slot filled by ``fn``."""
    return dataclasses.replace(parts, slots={**parts.slots, name: Slot(fn, frozenset(wants))})


@functools.cache
def engine_of(config: str = "clipcov", parts_key=()) -> Fused:
    """The fused loop with the verifier in graph, compiled once for all tests that run it."""
    return Fused(parts_of(config, **dict(parts_key)), support.parity_verify)


@functools.cache
def fused(config: str = "clipcov", parts_key=()):
    """(state, metrics, sampled) after STEPS fused steps."""
    parts = parts_of(config, **dict(parts_key))
    return engine_of(config, parts_key).advance(loops.start(parts), loops.stacked(parts, STEPS), loops.LIVE)


def assert_same_training(out, expected):
    """Identical tokens, parameters to rounding; and that there was something to learn."""
    np.testing.assert_array_equal(out.sampled.tokens, expected.sampled.tokens)
    assert loops.distance(out.state.params, expected.state.params) < TOLERANCE
    assert 0 < np.mean(expected.sampled.correct) < 1
    assert np.any(expected.metrics["actor/grad_norm"] > 1e-4)


CONFIGS = support.one_of_each(support.config_names("rl"), support.way_between_phases)


def composed(config: typing.Any, composition: str) -> typing.Any:
    """Asking from inside the program is the same program around another objective; one with statistics stands for all."""
    slow = config.values[0] not in ("base", "rlpr") or (composition == "callback" and config.values[0] != "base")
    return pytest.param(*config.values, composition, marks=[*config.marks, *[pytest.mark.slow] * slow])


def restored(config: typing.Any) -> typing.Any:
    """Of those that keep something between steps, one with statistics and one with votes stand for all."""
    slow = config.values[0] not in ("base", "rlpr", "ttrl")
    return pytest.param(*config.values, marks=[*config.marks, *[pytest.mark.slow] * slow])


@pytest.mark.parametrize(
    "config, composition", [composed(config, how) for config in CONFIGS for how in ("split", "callback")]
)
def test_compositions_train_the_same(config, composition):
    """Verdicts in graph, by callback from inside the program, and between two programs."""
    parts, host = parts_of(config), loops.HostVerdicts()
    if composition == "split":
        engine = Split(parts, host, loops.mesh_of(), overlap=False)
    else:
        wanted = dict(group_size=parts.plan.group_size, with_answers=parts.wants("answers"))
        ask = rewards.by_callback(host, loops.mesh_of(), **wanted)
        engine = Fused(parts, ask)
    out = engine.advance(loops.start(parts), loops.stacked(parts, STEPS), loops.LIVE)
    assert_same_training(out, fused(config))
    for name, values in fused(config).metrics.items():
        np.testing.assert_allclose(out.metrics[name], values, rtol=0, atol=1e-9, err_msg=name)
    asked = np.concatenate(host.asked)
    assert len(asked) == STEPS * parts.plan.prompts_per_step * parts.plan.group_size


@pytest.mark.parametrize("config", [restored(config) for config in CONFIGS])
def test_a_restored_state_goes_on_as_if_never_saved(config, tmp_path):
    """Bit for bit: parameters, optimizer, statistics, metrics and tokens of the steps after a checkpoint."""
    parts, engine = parts_of(config), engine_of(config)
    first, then = (loops.stacked(parts, STEPS, first=STEPS * k) for k in range(2))
    state = engine.advance(loops.start(parts), first, loops.LIVE).state
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(STEPS, state, {})
    expected = engine.advance(state, then, loops.LIVE)
    restored = checkpoints.restore(STEPS, loops.start(parts, seed=1))
    checkpoints.close()
    out = engine.advance(restored, then, loops.LIVE)
    state_of = lambda out: host_copy(out.state)
    loops.assert_equal(
        (state_of(out), out.metrics, out.sampled), (state_of(expected), expected.metrics, expected.sampled)
    )
    assert np.any(out.metrics["actor/grad_norm"] > 0)  # a filter may leave a step without groups


@pytest.mark.slow  # tests/property/test_laws.py has it of an update
@pytest.mark.parametrize("config", ["clipcov", "klcov"])
def test_microbatches_are_invisible(config):
    """1 x 64 rows equals 8 x 8."""
    shape = dict(prompts_per_step=16, generated_prompts=16, minibatches=1)
    if config == "klcov":  # idle without a second update
        shape |= dict(epochs=2)
    runs = []
    for rows in (64, 8):
        parts = parts_of(config, **shape, microbatch_rows=rows)
        assert parts.plan.microbatches == 64 // rows
        runs.append(
            Fused(parts, support.parity_verify).advance(loops.start(parts), loops.stacked(parts, 2), loops.LIVE)
        )
    assert_same_training(runs[1], runs[0])


def odd_samples(valid):
    return (jnp.arange(valid.shape[1]) % 2 == 1) & jnp.ones_like(valid), {}


def test_compaction_trains_as_masking_does():
    """Keeping two samples of each group of four costs two rows a group and changes nothing else."""
    compact = with_slot(parts_of("base", train_group_size=2), "selection", odd_samples, "valid")
    masked = with_slot(parts_of("base"), "selection", odd_samples, "valid")
    assert compact.plan.rows == masked.plan.rows // 2
    out, expected = (
        Fused(parts, support.parity_verify).advance(loops.start(parts), loops.stacked(parts, 2), loops.LIVE)
        for parts in (compact, masked)
    )
    assert_same_training(out, expected)
    np.testing.assert_array_equal(out.metrics["training/trained_fraction"], 1.0)
    np.testing.assert_array_equal(expected.metrics["training/trained_fraction"], 0.5)


def test_groups_that_a_filter_drops_leave_no_trace():
    """Of eight prompts the filter keeps four: as if only those had been drawn."""

    def keep_odd(valid):
        return (jnp.arange(valid.shape[0]) % 2 == 1)[:, None] & valid, {}

    wide = with_slot(parts_of("base", generated_prompts=8), "selection", keep_odd, "valid")
    narrow = parts_of("base")
    prompts = loops.prompts_of(wide, 0)
    odd = jax.tree.map(lambda x: x[1::2], prompts)
    out, expected = (
        jax.jit(make_step(parts, support.parity_verify))(loops.start(parts), p, loops.LIVE)[0]
        for parts, p in ((wide, prompts), (narrow, odd))
    )
    assert loops.distance(out.params, expected.params) < TOLERANCE
    assert loops.distance(expected.params, loops.start(narrow).params) > 1e-4


def test_running_statistics_of_a_selection_are_kept():
    def count(valid, stats):
        return valid, {"seen": stats["seen"] + valid.sum()}

    parts = with_slot(parts_of("base"), "selection", count, "valid", "stats")
    state = loops.start(parts)
    state = dataclasses.replace(state, stats=state.stats | {"seen": jnp.int64(0)})
    out = Fused(parts, support.parity_verify).advance(state, loops.stacked(parts, 2), loops.LIVE)
    assert int(out.state.stats["seen"]) == 2 * parts.plan.rows


def test_overlapped_is_one_step_stale_and_says_so():
    """Batch k is drawn with the weights before update k - 1; the sampler's log-probabilities then differ."""
    parts = parts_of(minibatches=1)
    engine = Split(parts, loops.HostVerdicts(), loops.mesh_of(), overlap=True)
    state = loops.start(parts)
    engine.prime(state, loops.prompts_of(parts, 0), loops.LIVE)
    draw = jax.jit(lambda state, prompts: sample_phase(parts, state, prompts, loops.LIVE)[0].tokens)
    weights, outs = [jax.tree.map(jnp.copy, state.params)], []
    for step in range(STEPS):
        out = engine.advance(state, loops.stacked(parts, 1, first=step + 1), loops.LIVE)
        state = out.state
        weights.append(jax.tree.map(jnp.copy, state.params))
        outs.append(out)
    for step, out in enumerate(outs):
        stale = dataclasses.replace(loops.start(parts), params=weights[max(step - 1, 0)])
        np.testing.assert_array_equal(out.sampled.tokens[0], draw(stale, loops.prompts_of(parts, step)))
    drift = [float(out.metrics["rollout_corr/abs_diff_mean"][0]) for out in outs]
    assert drift[0] < 1e-12  # nothing was learned yet
    assert min(drift[1:]) > 1e-6
    live = fused(parts_key=(("minibatches", 1),))
    assert np.max(live.metrics["rollout_corr/abs_diff_max"]) < 1e-12
    np.testing.assert_array_equal(engine.pending[0].uid, loops.prompts_of(parts, STEPS).uid)  # what a checkpoint holds


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    """The verdicts of step 1 are NaN: its updates are skipped, those before and after are not."""
    parts = parts_of()
    limit = parts.plan.prompts_drawn

    def verify(rollout, prompts):
        verdicts = support.parity_verify(rollout, prompts)
        broken = jnp.repeat((prompts.uid >= limit) & (prompts.uid < 2 * limit), parts.plan.group_size)
        return Verdicts(jnp.where(broken, jnp.nan, verdicts.score), verdicts.valid)

    step = jax.jit(make_step(parts, verify))
    state, seen = loops.start(parts), []
    for k in range(3):
        before = state
        state, (metrics, _) = step(state, loops.prompts_of(parts, k), loops.LIVE)
        seen.append((float(metrics["actor/skipped_updates"]), int(state.stats["skipped_in_a_row"])))
        if k == 1:
            loops.assert_equal((state.params, state.opt_state), (before.params, before.opt_state))
        else:
            assert loops.distance(state.params, before.params) > 1e-4
    updates = parts.plan.updates_per_step
    assert seen == [(0, 0), (updates, updates), (0, 0)]
    assert int(state.stats["skipped_updates"]) == updates and int(state.stats["updates"]) == 2 * updates


@pytest.mark.parametrize(
    "config", [c if c == "clipcov" else pytest.param(c, marks=pytest.mark.slow) for c in support.config_names("rl")]
)
def test_reward_rises(config):
    """An easy task, learned by live sampling alone: say a certain token early. Single precision."""

    def verify(rollout, prompts):
        early = rollout.completion_mask & (jnp.arange(rollout.tokens.shape[1]) < rollout.prompt_len[:, None] + 2)
        right = (early & (rollout.tokens == 7)).any(1)
        return Verdicts(right.astype(rollout.rollout_logprobs.dtype), jnp.ones_like(right))

    config = support.load_config(config)
    config.optimizer.learning_rate = 1e-2
    with jax.enable_x64(False):
        sizes = dict(prompts_per_step=8, generated_prompts=8, group_size=8, train_group_size=8)
        parts = support.tiny_parts(config, model=dict(num_layers=1), rollout=dict(num_slots=64), **sizes)
        chunk = jax.jit(make_chunk(parts, verify))
        state, reward = loops.start(parts, scale=1.0), []
        for call in range(5):
            state, (metrics, _) = chunk(state, loops.stacked(parts, 12, first=12 * call), loops.LIVE)
            reward.append(np.asarray(metrics["critic/score/mean"]))
    first, last = float(reward[0][0]), float(reward[-1].mean())  # before any update, and of the last twelve steps
    assert first < 0.4 and last > first + 0.3, reward
