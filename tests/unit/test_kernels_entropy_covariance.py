"""token_statistics against float64 on full logits, and its gradients; covariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.entropy_covariance import chunked_xla, covariance, row_blocks_xla, token_statistics
from kernels.entropy_covariance.public import IMPLEMENTATIONS

NAMES = sorted(IMPLEMENTATIONS.keys() - {"pallas_tpu", "pallas_hopper"})  # these have files of their own


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and a remainder at test sizes; and no silent rank promotion."""
    monkeypatch.setattr(chunked_xla, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(chunked_xla, "MIN_BLOCK", 128)
    monkeypatch.setattr(row_blocks_xla, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(row_blocks_xla, "MIN_ROWS", 4)
    with jax.numpy_rank_promotion("raise"):
        yield


def case(rows=13, depth=8, vocab=300, dtype=np.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(rows, depth)) * scale, dtype)
    unembedding = jnp.asarray(rng.normal(size=(depth, vocab)), dtype)
    return hidden, unembedding, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def oracle(hidden, unembedding, targets, temperature=1.0, soft_cap=None, vocab_size=None):
    """float64, from all logits; the entropy as a sum of -p log p."""
    raw = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    raw = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    z = (raw / temperature)[:, :vocab_size]
    top = z.max(1, keepdims=True)
    others = np.exp(z - top).sum(1) - 1
    # The maximum's own 1 is left out of the sum, as log1p is what keeps small entropies.
    rest = np.where(np.arange(z.shape[1]) == z.argmax(1)[:, None], 0, np.exp(z - top)).sum(1)
    assert np.allclose(rest, others, atol=1e-12)
    logp = z - top - np.log1p(rest)[:, None]
    with np.errstate(invalid="ignore"):
        entropy = np.where(np.exp(logp) > 0, -np.exp(logp) * logp, 0).sum(1)
    return np.take_along_axis(logp, np.asarray(targets)[:, None], 1)[:, 0], entropy, top[:, 0] + np.log1p(rest)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (jnp.bfloat16, 2e-6), (np.float64, 1e-13)])
def test_matches_float64(name, dtype, tolerance):
    """bf16 operands multiply exactly and accumulate in fp32: the oracle sees the same rounded operands."""
    with jax.enable_x64(dtype == np.float64):
        args = case(dtype=dtype)
        function = jax.jit(functools.partial(token_statistics, soft_cap=5.0, implementation=name))
        got = function(*args, temperature=jnp.asarray(0.7, np.float32))
        expected = oracle(*args, temperature=float(np.float32(0.7)), soft_cap=5.0)
        for name_, a, b in zip(got._fields, got, expected, strict=True):
            assert a.dtype == (np.float64 if dtype == np.float64 else np.float32)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name_)


@pytest.mark.parametrize("name", NAMES)
def test_low_entropy_keeps_its_digits(name):
    """z = (40, 40 - gap): p2 = e^-gap / (1 + e^-gap), far below fp32 eps; logsumexp - E[z] would give 0 or noise."""
    gaps = jnp.array([1.0, 8.0, 17.0, 25.0, 35.0])
    hidden = jnp.stack([jnp.full(5, 40.0), 40.0 - gaps], 1)
    got = jax.jit(functools.partial(token_statistics, implementation=name))(
        hidden, jnp.eye(2), jnp.zeros(5, jnp.int32), temperature=1.0
    )
    gap = np.asarray(gaps, np.float64)
    expected = np.log1p(np.exp(-gap)) + gap * np.exp(-gap) / (1 + np.exp(-gap))
    np.testing.assert_allclose(got.entropy, expected, rtol=1e-5)
    np.testing.assert_allclose(got.logprob, -np.log1p(np.exp(-gap)), rtol=1e-5)
    assert (got.logprob <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_and_tied_logits(name, scale):
    """Rounding of z itself is eps |z| and moves log p by as much."""
    hidden, unembedding, targets = case(scale=scale)
    unembedding = unembedding.at[:, 200:].set(unembedding[:, 5:6])  # ties, across blocks
    got = jax.jit(functools.partial(token_statistics, temperature=0.7, implementation=name))(
        hidden, unembedding, targets
    )
    expected = oracle(hidden, unembedding, targets, float(np.float32(0.7)))
    atol = 2e-6 * max(1.0, 10 * scale)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=atol)


def test_uniform_rows_are_exact():
    got = token_statistics(jnp.zeros((3, 4)), jnp.ones((4, 512)), jnp.zeros(3, jnp.int32), temperature=1.0)
    np.testing.assert_allclose(got.entropy, np.log(512), rtol=1e-6)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_impossible_columns_and_padding(name, soft_cap):
    """-inf columns and columns from vocab_size on are as if cut off, gradients included; no cap lifts them to -cap."""
    hidden, unembedding, targets = case()
    hidden, targets = jnp.abs(hidden), targets % 250
    run = functools.partial(token_statistics, temperature=1.0, soft_cap=soft_cap, implementation=name)

    def total(hidden, unembedding, **options):
        out = run(hidden, unembedding, targets, **options)
        return jnp.sum(out.logprob + 2 * out.entropy + 3 * out.logsumexp)

    grad = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnames="vocab_size")
    value, (d_hidden, d_weight) = grad(hidden, unembedding[:, :250])
    infinite = unembedding.at[:, 250:].set(-jnp.inf)
    for weight, options in [(unembedding, dict(vocab_size=250)), (infinite, {})]:
        got, (dh, dw) = grad(hidden, weight, **options)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(dw[:, :250], d_weight, rtol=1e-4, atol=1e-5)
        assert not dw[:, 250:].any()
        if not options and name == "reference":
            continue  # autodiff of its product meets 0 * inf
        np.testing.assert_allclose(dh, d_hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_targets_outside_leave_the_row_finite(name):
    hidden, unembedding, _ = case(rows=3)
    got = token_statistics(hidden, unembedding, jnp.array([-1, 300, 10**6]), temperature=1.0, implementation=name)
    np.testing.assert_allclose(got.logprob, -got.logsumexp, rtol=1e-6)


def scalar(function, cotangents):
    return lambda *args: sum(jnp.vdot(c, x) for c, x in zip(cotangents, function(*args), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name):
    with jax.enable_x64(True):
        hidden, unembedding, targets = case(rows=5, depth=3, vocab=140, dtype=np.float64)
        rng = np.random.default_rng(1)
        cotangents = rng.normal(size=(3, 5))
        loss = jax.jit(
            scalar(
                lambda h, w: token_statistics(h, w, targets, temperature=0.8, soft_cap=4.0, implementation=name),
                jnp.asarray(cotangents),
            )
        )
        grads = jax.grad(loss, (0, 1))(hidden, unembedding)
        for _ in range(4):
            step = [1e-5 * rng.normal(size=x.shape) for x in (hidden, unembedding)]
            difference = loss(hidden + step[0], unembedding + step[1]) - loss(hidden - step[0], unembedding - step[1])
            expected = sum(jnp.vdot(g, s) for g, s in zip(grads, step, strict=True)) * 2
            np.testing.assert_allclose(difference, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_autodiff_of_the_definition(name, dtype, tolerance):
    hidden, unembedding, targets = case(dtype=dtype)
    cotangents = jnp.asarray(np.random.default_rng(1).normal(size=(3, 13)), jnp.float32)

    def definition(hidden, unembedding):
        z = hidden.astype(jnp.float32) @ unembedding.astype(jnp.float32) / 0.7
        logp = jax.nn.log_softmax(z)
        logprob = jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
        return logprob, -jnp.sum(jnp.exp(logp) * logp, 1), jax.nn.logsumexp(z, 1)

    @jax.checkpoint
    def kernel(hidden, unembedding):
        return token_statistics(hidden, unembedding, targets, temperature=0.7, implementation=name)

    got = jax.jit(jax.grad(scalar(kernel, cotangents), (0, 1)))(hidden, unembedding)
    expected = jax.jit(jax.grad(scalar(definition, cotangents), (0, 1)))(hidden, unembedding)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        norm = np.linalg.norm(np.asarray(b, np.float64))
        assert np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) < tolerance * norm


@pytest.mark.parametrize("name", NAMES)
def test_sharded_rows_and_vocabulary(name):
    """Two shards of rows, two of the vocabulary: the same numbers, and no logits gathered."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    hidden, unembedding, targets = case(rows=64, vocab=512)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    run = jax.jit(
        jax.value_and_grad(
            lambda h, w, t: jnp.sum(
                jnp.stack(
                    token_statistics(h, w, t, temperature=0.7, row_shards=2, vocab_shards=2, implementation=name)
                )
            ),
            (0, 1),
        )
    )
    sharded = place(hidden, "data"), place(unembedding, None, "tensor"), place(targets, "data")
    expected = run(hidden, unembedding, targets)
    for a, b in zip(jax.tree.leaves(run(*sharded)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    lines = run.lower(*sharded).compile().as_text().splitlines()
    gathers = [line for line in lines if " all-gather(" in line or " all-to-all(" in line]
    assert not gathers, gathers


def test_chunks_hold_no_full_logits():
    hidden, unembedding, targets = case(rows=256, depth=8, vocab=8192)

    def temporary(name):
        loss = lambda h, w: jnp.sum(jnp.stack(token_statistics(h, w, targets, temperature=1.0, implementation=name)))
        return (
            jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding).compile().memory_analysis().temp_size_in_bytes
        )

    full = 256 * 8192 * 4
    assert temporary("reference") > full / 2
    assert temporary("chunked_xla") < full / 4
    assert temporary("row_blocks_xla") < full / 4


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(implementation="pallas"), 'implementation="pallas".*"reference"'),
        (dict(soft_cap=0.0), "soft_cap"),
        (dict(vocab_size=301), "vocab_size=301"),
        (dict(vocab_shards=7), "vocab_shards=7"),
        (dict(row_shards=0), "row_shards=0"),
    ],
)
def test_errors_name_the_argument(options, words):
    with pytest.raises(ValueError, match=words):
        token_statistics(*case(), temperature=1.0, **options)


def test_covariance_by_hand():
    """Masked means: A 1, lp -2, so (A - 1)(lp + 2) = (1)(1), (-1)(-1) and 0 off the mask."""
    logprob = jnp.array([[-1.0, -3.0, jnp.nan]])
    got = covariance(logprob, jnp.array([[2.0, 0.0, 5.0]]), jnp.array([[True, True, False]]))
    np.testing.assert_allclose(got, [[1.0, 1.0, 0.0]])


def test_covariance_is_global_detached_and_zero_when_empty():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    logprob, advantages = (jnp.asarray(rng.normal(size=(8, 5)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((8, 5)) < 0.6)
    sharded = jax.shard_map(
        functools.partial(covariance, axis_names=("data",)), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    got, expected = sharded(logprob, advantages, mask), covariance(logprob, advantages, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.sum(expected), np.cov(logprob[mask], advantages[mask], bias=True)[0, 1] * mask.sum(), rtol=1e-4
    )
    assert not jax.grad(lambda x: jnp.sum(covariance(x, x, mask)))(logprob).any()
    assert not covariance(logprob, advantages, jnp.zeros_like(mask)).any()
