"""Laws every objective obeys; each config of configs/ brings its objective here unasked."""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_reason.methods
from rl_reason import slots
from rl_reason.methods import clip_cov, grpo, kl_cov
from tests.support import config_names, configs_whose_objective, load_config

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

CONFIGS = config_names("rl")
MODULES = sorted(m.name for m in pkgutil.iter_modules(rl_reason.methods.__path__))
N, T = 4, 5
LENGTHS = np.array([5, 3, 2, 0])  # an empty row too
MASK = np.arange(T) < LENGTHS[:, None]
FAILED = dict(rewards=jnp.zeros(N))  # a term that imitates what is right reads no advantage: it has nothing to imitate


def draw(seed):
    """Everything the objective slot offers, on ``MASK``; clean zeros off it, as the loop gives them."""
    rng = np.random.default_rng(seed)
    tokens = lambda x: jnp.asarray(np.where(MASK, x, 0.0), jnp.float32)
    logprobs = -rng.exponential(size=(N, T))
    rewards = rng.integers(0, 2, N)
    return dict(
        logprobs=tokens(logprobs),
        old_logprobs=tokens(logprobs + 0.1 * rng.normal(size=(N, T))),
        ref_logprobs=tokens(logprobs + 0.3 * rng.normal(size=(N, T))),
        rollout_logprobs=tokens(logprobs + 0.01 * rng.normal(size=(N, T))),
        entropy=tokens(rng.exponential(size=(N, T))),
        advantages=tokens(2 * rng.normal(size=(N, 1)) * np.ones((N, T))),
        completion_mask=jnp.asarray(MASK),
        rewards=jnp.asarray(rewards, jnp.float32),
        correct=jnp.asarray(rewards, jnp.float32),
        success_rate=jnp.full(N, 0.5),
        off_policy=jnp.zeros(N, bool),
        reference_mask=jnp.asarray(MASK & (np.arange(T) > 2)),
        token_scores=tokens(600.0 * rng.choice([-1.0, 1.0], (N, T))),  # so sure that weights are 0 or 1
        key=jax.random.key(seed),
    )


@functools.cache
def compiled(name):
    """(losses by term, gradient of their sum over valid tokens by array, metrics) of a config's objective."""
    slot = slots.resolve("objective", load_config(name).objective.to_dict())

    def run(offered):
        def total(floats):
            losses, metrics = slot(offered | floats)
            terms = losses if isinstance(losses, dict) else {"policy": losses}
            return sum(jnp.where(MASK, x, 0.0).sum() for x in terms.values()), (terms, metrics)

        floats = {k: offered[k] for k in ("logprobs", "entropy")}
        grads, (terms, metrics) = jax.grad(total, has_aux=True)(floats)
        return terms, grads, metrics

    return jax.jit(run)


@functools.cache
def gradient_of_advantages(name):
    """``compiled``, of those terms alone that read advantages: a KL term, say, goes its own way."""
    slot = slots.resolve("objective", load_config(name).objective.to_dict())

    def terms_of(offered):
        losses, _ = slot(offered)
        return losses if isinstance(losses, dict) else {"policy": losses}

    one, other = (terms_of(draw(0) | dict(advantages=factor * draw(0)["advantages"])) for factor in (1.0, 2.0))
    reading = [term for term in one if bool((one[term] != other[term])[MASK].any())]
    assert reading, "asks for advantages and does not read them"

    def total(logprobs, offered):
        terms = terms_of(offered | dict(logprobs=logprobs))
        return sum(jnp.where(MASK, terms[term], 0.0).sum() for term in reading)

    return jax.jit(lambda offered: jax.grad(total)(offered["logprobs"], offered))


def test_draw_offers_everything():
    assert set(draw(0)) == slots.OFFERED["objective"]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), filler=st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -7.0]))
def test_padding_is_invisible(name, seed, filler):
    run = compiled(name)
    clean = draw(seed)
    dirty = {
        k: jnp.where(MASK, x, filler) if x.shape == (N, T) and x.dtype == jnp.float32 else x for k, x in clean.items()
    }
    (terms, grads, metrics), (dirty_terms, dirty_grads, dirty_metrics) = run(clean), run(dirty)
    for term in terms:
        np.testing.assert_array_equal(dirty_terms[term][MASK], terms[term][MASK])
    for array in grads:
        np.testing.assert_array_equal(dirty_grads[array][MASK], grads[array][MASK])
        np.testing.assert_array_equal(grads[array][~MASK], 0.0)
    for metric in metrics:
        np.testing.assert_array_equal(dirty_metrics[metric], metrics[metric])


@pytest.mark.parametrize("name", configs_whose_objective(asks=["advantages"]))
def test_zero_advantages_give_zero_gradient_on_policy(name):
    offered = draw(0)
    still = offered | FAILED | dict(advantages=jnp.zeros((N, T)), old_logprobs=offered["logprobs"])
    np.testing.assert_array_equal(gradient_of_advantages(name)(still), 0.0)


@pytest.mark.parametrize("name", configs_whose_objective(asks=["advantages"]))
def test_on_policy_gradient_of_each_token_is_minus_its_advantage_or_nothing(name):
    # With ratio 1 no clip and no penalty acts; selection may only switch tokens off.
    offered = draw(1)
    grads = gradient_of_advantages(name)(offered | FAILED | dict(old_logprobs=offered["logprobs"]))
    got, want = grads[MASK], -offered["advantages"][MASK]
    assert bool(((got == want) | (got == 0)).all()) and bool((got == want).any())


@pytest.mark.parametrize("name", configs_whose_objective(does_not_ask=["key"]))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(N)))
def test_order_of_rows_does_not_matter(name, seed, order):
    # Where a key decides, it decides by position: clip_cov has a test of its own below.
    offered, order = draw(seed), jnp.array(order)
    moved = {k: x if k == "key" else x[order] for k, x in offered.items()}
    mask = moved["completion_mask"]
    slot = slots.resolve("objective", load_config(name).objective.to_dict())
    losses, moved_losses = (slot(x)[0] for x in (offered, moved))
    for x, y in zip(jax.tree.leaves(losses), jax.tree.leaves(moved_losses), strict=True):
        np.testing.assert_allclose(y[mask], x[order][mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_to_train_on_gives_no_gradient_and_finite_metrics(name):
    slot = slots.resolve("objective", load_config(name).objective.to_dict())
    _, metrics = slot(draw(0) | dict(completion_mask=jnp.zeros((N, T), bool)))
    assert all(np.isfinite(value) for value in metrics.values())


def clip_cov_losses(offered, ratio):
    return clip_cov.objective(
        *(offered[k] for k in ("logprobs", "old_logprobs", "advantages", "completion_mask", "key")),
        clip_eps_low=1.0,
        clip_eps_high=1.0,
        clip_cov_ratio=ratio,
        clip_cov_low=0.05,
        clip_cov_high=5.0,
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(N)))
def test_clip_cov_taking_every_candidate_ignores_the_order(seed, order):
    offered, order = draw(seed), jnp.array(order)
    moved = {k: x if k == "key" else x[order] for k, x in offered.items()}
    x, metrics = clip_cov_losses(offered, 1.0)
    y, moved_metrics = clip_cov_losses(moved, 1.0)
    mask = moved["completion_mask"]
    np.testing.assert_allclose(y[mask], x[order][mask], rtol=1e-5, atol=1e-6)
    assert float(metrics["clip_cov/fraction"]) == float(moved_metrics["clip_cov/fraction"])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), hundredths=st.integers(0, 100))
def test_clip_cov_drops_exactly_its_budget(seed, hundredths):
    _, metrics = clip_cov_losses(draw(seed), hundredths / 100)
    valid = int(MASK.sum())
    candidates = round(float(metrics["clip_cov/candidate_fraction"]) * valid)
    dropped = round(float(metrics["clip_cov/fraction"]) * valid)
    assert dropped == min(max(hundredths * valid // 100, 1), candidates)


def test_kl_cov_with_zero_advantages_is_the_penalty_alone():
    # Every covariance is 0: the first floor(0.2 * 10) = 2 tokens in row order pay, and nothing else moves.
    offered = draw(0) | dict(advantages=jnp.zeros((N, T)))
    args = [offered[k] for k in ("logprobs", "old_logprobs", "advantages", "completion_mask")]
    losses, _ = kl_cov.objective(*args, kl_cov_ratio=0.2, kl_cov_coef=1.0)
    gap = np.abs(offered["logprobs"] - offered["old_logprobs"])
    np.testing.assert_array_equal(np.flatnonzero(losses), [0, 1])
    np.testing.assert_array_equal(losses[0, :2], gap[0, :2])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), power=st.integers(-3, 3))
def test_grpo_is_homogeneous_in_the_advantages(seed, power):
    # Exactly, for powers of two: clips compare products with A, never A with a constant.
    offered, factor = draw(seed), 2.0**power
    names = ("logprobs", "old_logprobs", "advantages", "completion_mask")
    run = functools.partial(grpo.objective, clip_eps_low=0.2, clip_eps_high=0.3, dual_clip_ratio=3.0)
    x, _ = run(*(offered[k] for k in names))
    y, _ = run(*((offered | dict(advantages=factor * offered["advantages"]))[k] for k in names))
    np.testing.assert_array_equal(y, factor * x)


REWARDS = st.lists(st.lists(st.floats(-4, 4, width=16), min_size=6, max_size=6), min_size=3, max_size=3)
VALID = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3)


@functools.cache
def grpo_advantages(divide, ddof):
    return jax.jit(functools.partial(grpo.advantages, divide_by_std=divide, ddof=ddof, std_eps=1e-6))


@settings(max_examples=40, deadline=None)
@given(rewards=REWARDS, valid=VALID, order=st.permutations(range(6)), divide=st.booleans(), ddof=st.integers(0, 1))
def test_group_advantages(rewards, valid, order, divide, ddof):
    rewards, valid, order = np.array(rewards, np.float32), np.array(valid), list(order)
    run = lambda rewards, valid: np.asarray(grpo_advantages(divide, ddof)(jnp.asarray(rewards), jnp.asarray(valid)))
    a = run(rewards, valid)
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[~valid], 0.0)
    np.testing.assert_allclose(a.sum(1), 0, atol=1e-3)  # centred over valid rows
    np.testing.assert_allclose(run(rewards[:, order], valid[:, order]), a[:, order], atol=1e-3)
    np.testing.assert_allclose(run(rewards[::-1], valid[::-1]), a[::-1], atol=1e-5)  # groups do not see each other
    np.testing.assert_array_equal(run(np.where(valid, rewards, np.float32(np.nan)), valid), a)
    if not divide:
        np.testing.assert_array_equal(run(2 * rewards, valid), 2 * a)


@pytest.mark.parametrize("module", MODULES)
def test_hyperparameters_have_no_default_in_code(module):
    found = importlib.import_module(f"rl_reason.methods.{module}")
    functions = [f for f in vars(found).values() if inspect.isfunction(f) and f.__module__ == found.__name__]
    assert functions
    for fn in functions:
        defaults = [p.name for p in inspect.signature(fn).parameters.values() if p.default is not p.empty]
        assert not defaults, f"{module}.{fn.__name__}: {defaults} belong into the config"
        kinds = {p.kind for p in inspect.signature(fn).parameters.values()}
        assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}, fn
