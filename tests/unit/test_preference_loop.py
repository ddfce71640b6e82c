"""The preference loop: live and precomputed references, padding, symmetry, microbatches, gradients, skipped updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reason import build, processes, sharding
from rl_reason.loop import preference
from rl_reason.loop.preference import Pairs, PreferenceSetting
from rl_reason.methods import dpo
from tests import support

COMPLETION_LEN = 6
SIGMOID = dict(loss_type="sigmoid", beta=0.5, label_smoothing=0.0)


def objective(**options):
    return lambda offered: dpo.objective(**offered, **SIGMOID | options)


def setting(microbatches=1, **options) -> PreferenceSetting:
    return PreferenceSetting(objective(**options), COMPLETION_LEN, 1.0, microbatches)


@functools.cache
def parts(dtype="float32", moe=False, learning_rate=1e-2):
    optimizer = optax.adamw(learning_rate)
    model = dict(num_layers=1, dtype=dtype, param_dtype=dtype) | (support.MOE if moe else {})
    made = dataclasses.replace(
        support.tiny_parts(model=model), optimizer=optimizer, router_coefs=dict(balance=0.1, z=0.01)
    )
    return dataclasses.replace(made, schedule=optax.constant_schedule(learning_rate))


def make_pairs(num=4, seed=0, width=support.PROMPT_WIDTH + COMPLETION_LEN, pad=support.PAD, lengths=None) -> Pairs:
    """Random pairs; a row is prompt, completion, ``pad``."""
    rng = np.random.default_rng(seed)
    prompt_len = rng.integers(1, support.PROMPT_WIDTH + 1, num)
    shared = rng.integers(3, support.VOCAB, (num, support.PROMPT_WIDTH))
    sides = []
    for side in range(2):
        length = rng.integers(1, COMPLETION_LEN + 1, num) if lengths is None else np.array(lengths[side])
        tokens, mask = np.full((num, width), pad), np.zeros((num, width), bool)
        completion = rng.integers(3, support.VOCAB, (num, COMPLETION_LEN))
        for row in range(num):
            begin, end = prompt_len[row], prompt_len[row] + length[row]
            tokens[row, :begin] = shared[row, :begin]
            tokens[row, begin:end] = completion[row, : length[row]]
            mask[row, begin:end] = True
        sides.append((jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))
    (chosen, chosen_mask), (rejected, rejected_mask) = sides
    return Pairs(chosen, rejected, jnp.asarray(prompt_len, jnp.int32), chosen_mask, rejected_mask)


def params_of(parts, seed=0):
    return support.tiny_params(parts.model, seed, 1.5)


def state_of(parts, ref_seed: int | None = 1):
    """A policy and a reference that differ."""
    reference = None if ref_seed is None else params_of(parts, ref_seed)
    return dataclasses.replace(build.new_state(parts, params_of(parts), 0), ref_params=reference)


def stack(*batches):
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def gap(a, b) -> float:
    """The largest difference of two trees; masks must be equal."""
    distance = lambda x, y: np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)), initial=0.0)
    return float(max(jax.tree.leaves(jax.tree.map(distance, a, b))))


@functools.cache
def compiled(moe=False, microbatches=1, loss_type="sigmoid"):
    """(params, ref_params, pairs) -> (loss, metrics, gradient, pairs with reference), in float64."""
    p, s = parts("float64", moe), setting(microbatches, loss_type=loss_type)

    def run(params, ref_params, pairs):
        pairs = preference.with_reference(p, s, ref_params, pairs)
        return *preference.loss_and_gradient(p, s, params, pairs), pairs

    return jax.jit(run)


@functools.cache
def chunk():
    return jax.jit(preference.make_chunk(parts(), setting()))


def test_pair_logprobs_are_sums_of_log_softmax():
    from rl_reason.models import transformer

    p, pairs = parts(), make_pairs()
    params = params_of(p)
    scores = jax.jit(
        lambda params, pairs: preference.pair_logprobs(params, pairs, p.model, jnp.asarray(2.0), COMPLETION_LEN)
    )(params, pairs)

    @jax.jit
    def direct(params, tokens, mask):
        hidden = transformer.forward(params, tokens, jnp.ones_like(mask), p.model).hidden
        logprobs = jax.nn.log_softmax((hidden @ transformer.unembedding(params, p.model) / 2.0)[:, :-1])
        of_tokens = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        return tuple(jnp.where(mask[:, 1:], x, 0.0).sum(1) for x in (of_tokens, entropy))

    for name in ("chosen", "rejected"):
        logprobs, entropy = direct(params, getattr(pairs, f"{name}_tokens"), getattr(pairs, f"{name}_mask"))
        np.testing.assert_allclose(getattr(scores, name), logprobs, rtol=2e-5)
        np.testing.assert_allclose(getattr(scores, f"{name}_entropy"), entropy, rtol=2e-5)


def test_a_live_reference_equals_a_precomputed_one():
    p, s = parts(), setting()
    state = state_of(p)
    data = [make_pairs(4, seed) for seed in range(3)]
    chosen, rejected = preference.precompute_reference(p, s, state.ref_params, data, num_pairs=11)
    assert chosen.shape == rejected.shape == (11,)
    chosen, rejected = preference.precompute_reference(p, s, state.ref_params, data, num_pairs=12)
    known = [
        dataclasses.replace(
            pairs,
            ref_chosen_logprobs=jnp.asarray(chosen[i : i + 4]),
            ref_rejected_logprobs=jnp.asarray(rejected[i : i + 4]),
        )
        for i, pairs in zip((0, 4, 8), data, strict=True)
    ]
    live, live_metrics = chunk()(state, stack(*data))
    without = dataclasses.replace(state, ref_params=None)
    done, metrics = chunk()(without, stack(*known))
    assert gap(live.params, done.params) < 1e-6
    for name, values in live_metrics.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match=r"need TrainState\.ref_params"):
        chunk()(without, stack(*data))
    with pytest.raises(ValueError, match="12 pairs in the batches and num_pairs=13"):
        preference.precompute_reference(p, s, state.ref_params, data, num_pairs=13)


@pytest.mark.usefixtures("x64")
def test_padding_is_invisible():
    narrow, wide = make_pairs(), make_pairs(width=support.PROMPT_WIDTH + COMPLETION_LEN + 5, pad=7)
    params, reference = params_of(parts("float64")), params_of(parts("float64"), 1)
    a, b = (compiled(loss_type="ipo")(params, reference, x)[:3] for x in (narrow, wide))
    assert gap(a, b) < 1e-12


@pytest.mark.usefixtures("x64")
def test_swapping_chosen_and_rejected():
    # loss(-Delta) - loss(Delta) = beta Delta; rewards change places, and with equal policy and reference so do gradients.
    pairs = make_pairs()
    swapped = Pairs(
        pairs.rejected_tokens, pairs.chosen_tokens, pairs.prompt_len, pairs.rejected_mask, pairs.chosen_mask
    )
    params, reference = params_of(parts("float64")), params_of(parts("float64"), 1)
    (a, metrics, *_), (b, others, *_) = (compiled()(params, reference, x) for x in (pairs, swapped))
    assert float(b - a) == pytest.approx(float(metrics["rewards/margins"]), abs=1e-12)
    assert float(metrics["rewards/chosen"]) == pytest.approx(float(others["rewards/rejected"]), abs=1e-12)
    assert float(metrics["rewards/accuracies"] + others["rewards/accuracies"]) == pytest.approx(1.0)
    grads = [compiled()(params, params, x)[2] for x in (pairs, swapped)]
    assert gap(grads[0], jax.tree.map(np.negative, grads[1])) < 1e-12


@pytest.mark.parametrize("moe", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "moe"])
@pytest.mark.usefixtures("x64")
def test_microbatches_are_invisible(moe):
    p, pairs = parts("float64", moe), make_pairs(4)
    params, reference = params_of(p), params_of(p, 1)
    whole = compiled(moe)(params, reference, pairs)
    assert gap(whole, compiled(moe, 2)(params, reference, pairs)) < 1e-12
    assert ("router/balance_loss" in whole[1]) == moe
    with pytest.raises(ValueError, match="4 pairs a step / microbatches=3"):
        preference.loss_and_gradient(p, setting(3), params, pairs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_finite_differences(loss_type):
    p = parts("float64")
    params, reference, pairs = params_of(p), params_of(p, 1), make_pairs()
    run = compiled(loss_type=loss_type)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    moved = lambda by: float(run(jax.tree.map(lambda x, d: x + by * d, params, direction), reference, pairs)[0])
    grads = run(params, reference, pairs)[2]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((np.asarray(g) * d).sum()), grads, direction)))
    eps = 1e-5
    assert (moved(eps) - moved(-eps)) / (2 * eps) == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-3


def test_learning_separates_the_pairs():
    p, s = parts(), setting()
    state = state_of(p, ref_seed=0)  # the reference is the initial policy
    pairs = make_pairs()
    state, metrics = chunk()(state, stack(*[pairs] * 20))
    assert float(metrics["actor/preference_loss"][0]) == pytest.approx(np.log(2), abs=1e-5)
    assert float(metrics["rewards/margins"][0]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["rewards/accuracies"][-1]) == 1.0
    assert float(metrics["actor/preference_loss"][-1]) < 0.3
    assert int(state.step) == 20 and int(state.stats["updates"]) == 20
    expected = {
        "actor/grad_norm",
        "actor/lr",
        "actor/entropy",
        "actor/skipped_updates",
        "logps/chosen",
        "logps/rejected",
    }
    assert expected <= set(metrics) and metrics["actor/grad_norm"].shape == (20,)
    held_out = jax.jit(lambda a, b, x: preference.evaluate(p, s, a, b, x))(state.params, state.ref_params, pairs)
    assert set(held_out) == set(metrics) - {"actor/grad_norm", "actor/lr", "actor/skipped_updates"}


def test_a_batch_that_is_not_finite_is_skipped_and_counted():
    state = dataclasses.replace(state_of(parts()), ref_params=None)
    reference = jnp.array([-4.0, -9.0, -7.0, -5.0])
    known = dataclasses.replace(make_pairs(), ref_chosen_logprobs=reference, ref_rejected_logprobs=reference[::-1])
    broken = dataclasses.replace(known, ref_chosen_logprobs=reference.at[0].set(jnp.nan))
    first, metrics = chunk()(state, stack(broken, known, broken))
    assert metrics["actor/skipped_updates"].tolist() == [1, 0, 1]
    assert (int(first.stats["skipped_updates"]), int(first.stats["updates"]), int(first.step)) == (2, 1, 3)
    last, _ = chunk()(state, stack(broken, broken, known))
    assert gap(first.params, last.params) == 0.0 < gap(first.params, state.params)


@pytest.mark.usefixtures("x64")
def test_an_empty_completion_is_counted_and_finite():
    # Empty: one chosen and one rejected of four pairs; IPO divides by the length.
    params, reference = params_of(parts("float64")), params_of(parts("float64"), 1)
    pairs = make_pairs(4, lengths=[[0, 3, 2, 6], [2, 3, 0, 1]])
    loss, metrics, grads, _ = compiled(loss_type="ipo")(params, reference, pairs)
    assert float(metrics["preference/empty_fraction"]) == 0.5
    assert float(metrics["response_length/chosen"]) == 11 / 4 and float(metrics["response_length/rejected"]) == 6 / 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, metrics, grads)))


@pytest.mark.usefixtures("x64")
def test_four_devices_are_one():
    p, s = parts("float64"), setting(2)
    state = state_of(p)
    batches = stack(make_pairs(8, 0), make_pairs(8, 1))
    alone, metrics = jax.jit(preference.make_chunk(p, s))(state, batches)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.like_params(state, state.params, mesh))
        rows = processes.to_global(jax.tree.map(np.asarray, batches), build.rows_sharding(mesh, leading=1))
        cut, cut_metrics = jax.jit(preference.make_chunk(p, s))(placed, rows)
        close = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), alone.params, cut.params)
    assert max(jax.tree.leaves(close)) < 1e-10
    np.testing.assert_allclose(cut_metrics["actor/preference_loss"], metrics["actor/preference_loss"], rtol=1e-10)


@pytest.mark.parametrize("changes", [dict(temperature=0.0), dict(completion_len=0), dict(microbatches=0)])
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="must be above 0"):
        dataclasses.replace(setting(), **changes)
