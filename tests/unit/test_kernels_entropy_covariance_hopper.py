"""The Hopper kernels of token_statistics in GPU interpret mode, lowered for CUDA, and on a chip (``-m gpu``)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.entropy_covariance import hopper_stream, pallas_hopper, public, token_statistics
from kernels.entropy_covariance.hopper_stream import Walk
from kernels.entropy_covariance.logits import Head
from tests.unit.test_kernels_entropy_covariance import case, oracle

INTERPRETER = getattr(plgpu, "InterpretGPUParams", None)  # jax 0.10's knows no clusters
on_chip = pytest.param("chip", marks=pytest.mark.gpu)
interpreted = pytest.param(
    "interpreted", marks=pytest.mark.skipif(INTERPRETER is None, reason="needs a newer jax's interpreter")
)
either = pytest.mark.parametrize("where", [interpreted, on_chip])


@pytest.fixture(autouse=True)
def few_clusters(monkeypatch, request):
    """Interpreted, two clusters: each visits several places."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(hopper_stream, "MULTIPROCESSORS", 4)


def kernel(where, hidden, unembedding, targets, temperature=1.0, soft_cap=None, vocab_size=None):
    head = Head(jnp.asarray(temperature, jnp.float32), soft_cap, vocab_size or unembedding.shape[1])
    interpret = INTERPRETER(detect_races=True) if INTERPRETER and where == "interpreted" else None
    return jax.jit(
        functools.partial(pallas_hopper.token_statistics, head=head, row_shards=1, vocab_shards=1, interpret=interpret)
    )(hidden, unembedding, targets)


def small(rows=13, depth=64, vocab=576, dtype=jnp.bfloat16, scale=0.2):
    return case(rows, depth, vocab, dtype, scale)


@either
@pytest.mark.parametrize(
    "dtype, soft_cap, sizes", [(jnp.bfloat16, None, (300, 128, 1088)), (jnp.float16, 5.0, (13, 64, 320))], ids=str
)
def test_matches_float64(where, dtype, soft_cap, sizes):
    rows, depth, vocab = sizes
    args = small(rows=rows, depth=depth, vocab=vocab, dtype=dtype)
    got = kernel(where, *args, temperature=0.7, soft_cap=soft_cap)
    for a, b in zip(got, oracle(*args, temperature=float(np.float32(0.7)), soft_cap=soft_cap), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6)


@either
def test_low_entropy_keeps_its_digits(where):
    gaps = jnp.array([1.0, 8.0, 17.0, 25.0, 35.0])
    hidden = jnp.zeros((5, 64)).at[:, 0].set(40.0).at[:, 1].set(40.0 - gaps).at[:, 2].set(-1000.0)
    unembedding = jnp.eye(64).at[2, 2:].set(1.0)  # two columns that matter
    args = hidden.astype(jnp.bfloat16), unembedding.astype(jnp.bfloat16), jnp.zeros(5, jnp.int32)
    logprob, entropy, _ = kernel(where, *args)
    gap = np.asarray(gaps, np.float64)
    np.testing.assert_allclose(entropy, np.log1p(np.exp(-gap)) + gap * np.exp(-gap) / (1 + np.exp(-gap)), rtol=1e-5)
    np.testing.assert_allclose(logprob, -np.log1p(np.exp(-gap)), rtol=1e-5)


@either
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_extreme_and_tied_logits(where, scale):
    hidden, unembedding, targets = small(scale=scale)
    unembedding = unembedding.at[:, 400:].set(unembedding[:, 5:6])  # ties, across tiles
    got = kernel(where, hidden, unembedding, targets, temperature=0.7)
    for a, b in zip(got, oracle(hidden, unembedding, targets, float(np.float32(0.7))), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=2e-5 * scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # rows of zeros past the last, by -inf
@either
def test_impossible_columns_padding_and_foreign_targets(where):
    """-inf adds nothing, columns from vocab_size on are as if cut off, and who has no target has a finite logprob."""
    hidden, unembedding, targets = small()
    hidden = jnp.abs(hidden)
    targets = jnp.full_like(targets, 8).at[:3].set(jnp.array([-1, 576, 300]))
    whole = unembedding.at[0, 7].set(-jnp.inf).at[:, 250:].set(jnp.nan)
    cut = oracle(hidden, jnp.delete(unembedding[:, :250], 7, axis=1), jnp.full_like(targets, 7))
    got = kernel(where, hidden, whole, targets, vocab_size=250)
    for a, b in zip(got, cut, strict=True):
        np.testing.assert_allclose(a[3:], b[3:], rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(got[0][:2], -got[2][:2], rtol=1e-6)
    assert got[0][2] == -jnp.inf  # a padded column


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # rows of zeros past the last, by -inf
@either
@pytest.mark.parametrize("soft_cap, tiles", [(None, 1), (5.0, 2), (None, 3)])
def test_gradients_are_those_of_the_meaning(where, soft_cap, tiles, monkeypatch):
    """In blocks of one or two tiles, of which the logits of the first are kept, or in one block: all are."""
    monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2 * 13 * 256 * tiles)
    hidden, unembedding, targets = small()
    hidden, unembedding, targets = jnp.abs(hidden), unembedding.at[0, 7].set(-jnp.inf), targets % 500
    weights = np.random.default_rng(1).normal(size=(3, 13))
    options = dict(temperature=0.7, soft_cap=soft_cap, vocab_size=500)

    def gradients(run):
        loss = lambda h, w: sum(jnp.vdot(x, c) for x, c in zip(run(h, w, targets, **options), weights, strict=True))
        return jax.grad(loss, (0, 1))(hidden, unembedding)

    got = gradients(functools.partial(kernel, where))
    expected = gradients(functools.partial(token_statistics, implementation="reference"))
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
    assert not got[1][:, 500:].any() and not got[1][:, 7].any()


@either
def test_kept_logits_keep_the_digits_of_what_is_nearly_certain(where, monkeypatch):
    """Target 3 is ahead of a column in its own tile and one in the next by 1 to 12: 1 - p, to what fp32 has of p."""
    gaps = jnp.array([1.0, 4.0, 8.0, 10.0, 12.0])
    hidden = jnp.zeros((5, 64)).at[:, 0].set(40.0).at[:, 1].set(40.0 - gaps).at[:, 2].set(-1000.0)
    unembedding = jnp.zeros((64, 512)).at[2].set(1.0)
    for column, feature in ((3, 0), (7, 1), (300, 1)):
        unembedding = unembedding.at[:, column].set(0).at[feature, column].set(1.0)
    args = hidden.astype(jnp.bfloat16), unembedding.astype(jnp.bfloat16), jnp.full(5, 3)
    gap = np.asarray(args[0][:, 0] - args[0][:, 1], np.float64)
    rest = 2 * np.exp(-gap) / (1 + 2 * np.exp(-gap))  # 1 - p
    for tiles in (1, 2):
        monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2 * 5 * 256 * tiles)
        d_hidden = jax.grad(lambda h: kernel(where, h, *args[1:])[0].sum())(args[0])
        np.testing.assert_allclose(np.asarray(d_hidden[:, 0], np.float64), rest, rtol=2**-7, atol=4e-6)
        np.testing.assert_allclose(np.asarray(d_hidden[:, 1], np.float64), -rest, rtol=2**-7, atol=4e-6)


@pytest.mark.parametrize(
    "shape, dtype, options, words",
    [
        ((8, 64, 128), jnp.float32, {}, 'bf16 or fp16 operands, not float32; use "chunked_xla"'),
        ((8, 64, 100), jnp.bfloat16, {}, r"multiples of 64, not unembedding \[D=64, V=100\]; pad the vocabulary"),
        ((8, 72, 128), jnp.bfloat16, {}, r"multiples of 64, not unembedding \[D=72, V=128\]"),
        ((8, 64, 128), jnp.bfloat16, dict(row_shards=2), "not row_shards=2, vocab_shards=1; use"),
    ],
)
def test_what_it_does_not_take(shape, dtype, options, words):
    args = case(*shape, dtype=dtype)
    with pytest.raises(ValueError, match=words):
        token_statistics(*args, temperature=1.0, implementation="pallas_hopper", **options)


# Logits of 256 MiB in 16 bits.
SHAPES = ((2048, 128), jnp.bfloat16), ((128, 65536), jnp.bfloat16), ((2048,), jnp.int32)


def num_kernels(function, platform="cuda"):
    """Calls of a kernel in what is lowered."""
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(*x) for x in SHAPES))
    return traced.lower(lowering_platforms=(platform,)).as_text().count("custom_call @mosaic_gpu")


def test_lowers_for_cuda_and_is_chosen_on_hopper_alone(monkeypatch):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    statistics = lambda h, w, t, **options: jnp.stack(token_statistics(h, w, t, temperature=0.7, **options))
    by_name = functools.partial(statistics, implementation="pallas_hopper", soft_cap=30.0)
    both_ways = lambda f: jax.value_and_grad(lambda h, w, t: jnp.sum(f(h, w, t)), (0, 1))
    assert num_kernels(both_ways(by_name)) == 1  # all logits are kept
    monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2**26)
    assert num_kernels(both_ways(by_name)) == 3  # four blocks: of the first and of others, and cotangents in a loop
    assert num_kernels(both_ways(statistics)) == 0
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert num_kernels(both_ways(statistics)) == 3
    monkeypatch.setattr(public, "OTHER_FULL_LOGITS_BYTES", 2**40)
    assert num_kernels(lambda *x: statistics(*x)) == 1  # where all at once are the default elsewhere, too
    monkeypatch.setattr(public, "HOPPER_LOGITS_BYTES", 2**29 + 1)
    assert num_kernels(lambda *x: statistics(*x)) == 0
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert num_kernels(statistics, "cpu") == 0
    with jax.set_mesh(mesh):
        assert num_kernels(statistics) == 0
    of_rows = jax.shard_map(statistics, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P(None, "data"))
    assert num_kernels(of_rows) == 1


def test_lowers_with_64_bit_numbers(x64, monkeypatch):
    monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2**27)
    temperature = jnp.asarray(0.7)
    by_name = lambda h, w, t: token_statistics(h, w, t, temperature=temperature, implementation="pallas_hopper")
    total = lambda h, w, t: jnp.sum(jnp.stack(by_name(h, w, t)))
    assert num_kernels(jax.grad(total, (0, 1))) == 3


@pytest.mark.gpu
def test_default_on_a_chip(monkeypatch):
    """By itself where the devices are Hopper GPUs; the same gradients, without the logits."""
    assert dispatch.on_hopper()
    monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2**26)
    hidden, unembedding, targets = case(rows=2048, depth=512, vocab=65536, dtype=jnp.bfloat16, scale=0.05)

    def run(**options):
        statistics = functools.partial(token_statistics, temperature=0.7, **options)
        loss = lambda h, w: jnp.sum(jnp.stack(statistics(h, w, targets)))
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembedding).compile()

    default = run()
    assert "mosaic_gpu" in str(default.as_text())
    expected = jax.tree.leaves(run(implementation="chunked_xla")(hidden, unembedding))
    for a, b in zip(jax.tree.leaves(default(hidden, unembedding)), expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b)


@pytest.mark.gpu
def test_cotangents_take_the_place_of_kept_logits(monkeypatch):
    monkeypatch.setattr(pallas_hopper, "BLOCK_BYTES", 2**27)
    hidden, unembedding, targets = case(rows=4096, depth=512, vocab=65664, dtype=jnp.bfloat16, scale=0.05)
    statistics = functools.partial(token_statistics, temperature=0.7, implementation="pallas_hopper")
    loss = lambda h, w: jnp.sum(jnp.stack(statistics(h, w, targets)))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding).compile()
    block = 2 * 4096 * pallas_hopper.block_width(4096, 65664)  # one of five
    assert block < compiled.memory_analysis().temp_size_in_bytes < 1.75 * block


@pytest.mark.parametrize("rows, columns", [(16384, 151936), (13, 320), (4096, 153216), (100_000, 32000), (1, 1)])
@pytest.mark.parametrize("run", [None, 1])
def test_walks_cover_every_tile_once(rows, columns, run):
    walk = Walk.over(rows, columns, run)
    assert walk.units * hopper_stream.UNIT >= rows > (walk.units - 1) * hopper_stream.UNIT
    assert walk.tiles * hopper_stream.COLUMNS >= columns
    assert walk.splits * walk.run >= walk.tiles > (walk.splits - 1) * walk.run  # no split is empty
    places = jnp.arange(walk.units * walk.splits)
    unit, split = jax.vmap(walk.place)(places)
    assert len(set(zip(unit.tolist(), split.tolist(), strict=True))) == len(places)
    assert int(unit.max()) == walk.units - 1 and int(split.max()) == walk.splits - 1


def test_busiest_cluster_has_no_more_than_its_share():
    walk = Walk.over(16384, 151936)
    visits = -(-walk.units * walk.splits // walk.clusters)
    assert visits * walk.run == walk.units * walk.tiles / walk.clusters
