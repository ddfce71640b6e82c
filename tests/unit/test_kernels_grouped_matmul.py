"""grouped_matmul and the routing around it: shapes of groups, gradients, dtypes, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul import combine, grouped_matmul, permute, route
from kernels.grouped_matmul.public import IMPLEMENTATIONS
from tests.support import portable

# None, the default, is what the other tests run; what is compiled for one kind of chip has a file of its own beside this.
NAMES = portable(IMPLEMENTATIONS)
M, K, N, E = 300, 7, 5, 6
GROUPS = {
    "uneven": [10, 0, 129, 31, 97, 33],
    "below M": [5, 0, 0, 40, 1, 0],
    "one": [0, 0, 300, 0, 0, 0],
    "none": [0] * 6,
    "half empty": [0, 100, 0, 100, 0, 100],
}


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def operands(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(M, K)), dtype), jnp.asarray(rng.normal(size=(E, K, N)), dtype)


def oracle(lhs, rhs, sizes):
    out, at = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for e, size in enumerate(sizes):
        out[at : at + size] = np.asarray(lhs[at : at + size], np.float64) @ np.asarray(rhs[e], np.float64)
        at += size
    return out


@functools.partial(jax.jit, static_argnames=("name", "transpose"))
def value_and_gradients(lhs, rhs, sizes, weights, name, transpose=False):
    def loss(lhs, rhs):
        out = grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose, implementation=name)
        return jnp.vdot(out.astype(weights.dtype), weights), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(lhs, rhs)
    return out, *grads


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", GROUPS)
def test_forward_and_gradients(name, groups):
    """d lhs = g rhs^T and d rhs = lhs^T g by group; rows beyond the groups hold NaN and take no part."""
    lhs, rhs = operands()
    sizes = GROUPS[groups]
    used = sum(sizes)
    lhs = lhs.at[used:].set(jnp.nan)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(M, N)), jnp.float32)
    for transpose in (False, True):
        given = jnp.swapaxes(rhs, 1, 2) if transpose else rhs
        out, d_lhs, d_rhs = value_and_gradients(lhs, given, jnp.asarray(sizes), weights, name, transpose)
        np.testing.assert_allclose(out, oracle(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)
        assert not out[used:].any() and not d_lhs[used:].any()
        np.testing.assert_allclose(d_lhs, oracle(weights, jnp.swapaxes(rhs, 1, 2), sizes), rtol=1e-5, atol=1e-5)
        ends = np.cumsum(sizes)
        for e in range(E):
            rows = slice(ends[e] - sizes[e], ends[e])
            expected = np.asarray(lhs[rows], np.float64).T @ np.asarray(weights[rows], np.float64)
            got = d_rhs[e].T if transpose else d_rhs[e]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, None])
def test_some_of_the_groups_alone(name):
    # Groups 2 and 3 of six: their rows are as before, all others 0 whatever they hold, and only theirs have a gradient.
    lhs, rhs = operands()
    sizes = GROUPS["uneven"]  # rows 139 to 169 are group 3's, 10 to 138 group 2's
    poisoned = lhs.at[jnp.r_[:10, 170:M]].set(jnp.nan)

    @jax.jit
    def run(lhs, part, sizes, offset):
        product = lambda lhs, part: grouped_matmul(lhs, part, sizes, group_offset=offset, implementation=name)
        out, back = jax.vjp(product, lhs, part)
        return out, *back(jnp.ones_like(out))

    whole = functools.partial(value_and_gradients, lhs, rhs, jnp.array(sizes), jnp.ones((M, N)))
    expected, d_lhs, d_rhs = whole(name=name)
    own = np.r_[10:170]
    for out, wanted in zip(
        run(poisoned, rhs[2:4], jnp.array(sizes), jnp.int32(2))[:2], (expected, d_lhs), strict=True
    ):
        np.testing.assert_allclose(np.asarray(out)[own], np.asarray(wanted)[own], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.delete(np.asarray(out), own, axis=0), 0)
    grad = run(poisoned, rhs[2:4], jnp.array(sizes), jnp.int32(2))[2]
    np.testing.assert_allclose(grad, d_rhs[2:4], rtol=1e-5, atol=1e-5)


def test_experts_over_the_devices_of_a_mesh():
    """In shard_map each device has its experts and all rows; the sum over the axis is the whole, and so are gradients."""
    lhs, rhs = operands()
    rhs = jnp.concatenate([rhs, rhs[:2] + 1])  # eight over four devices
    sizes = jnp.array([*GROUPS["below M"], 50, 3])
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

    def part(lhs, rhs, sizes):
        offset = jax.lax.axis_index("expert") * rhs.shape[0]
        return jax.lax.psum(grouped_matmul(lhs, rhs, sizes, group_offset=offset), "expert")

    sharded = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    loss = lambda run: lambda lhs, rhs: (run(lhs, rhs, sizes) ** 2).sum()
    found = jax.jit(jax.value_and_grad(loss(sharded), (0, 1)))(lhs, rhs)
    wanted = jax.jit(jax.value_and_grad(loss(grouped_matmul), (0, 1)))(lhs, rhs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 1, 31, 129])
def test_any_number_of_rows(name, rows):
    lhs, rhs = operands()
    sizes = jnp.array([0, rows // 2, 0, 0, rows - rows // 2, 0])
    got = jax.jit(functools.partial(grouped_matmul, implementation=name))(lhs[:rows], rhs, sizes)
    np.testing.assert_allclose(got, oracle(lhs[:rows], rhs, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name):
    sizes = jnp.array(GROUPS["uneven"])
    with jax.enable_x64(True):
        lhs, rhs = operands(np.float64)
        got = grouped_matmul(lhs, rhs, sizes, implementation=name)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, oracle(lhs, rhs, sizes), rtol=1e-13, atol=1e-13)
    lhs, rhs = operands(jnp.bfloat16)
    wide = grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.float32, implementation=name)
    assert wide.dtype == np.float32  # products of bf16 are exact in fp32
    np.testing.assert_allclose(wide, oracle(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)
    out, *grads = value_and_gradients(lhs, rhs, sizes, jnp.ones((M, N), jnp.bfloat16), name)
    assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name):
    with jax.enable_x64(True):
        lhs, rhs = operands(np.float64)
        sizes, rng = jnp.array(GROUPS["below M"]), np.random.default_rng(1)
        f = lambda a, b: jnp.sum(jnp.sin(grouped_matmul(a, b, sizes, implementation=name)))
        grads = jax.grad(f, (0, 1))(lhs, rhs)
        step = [1e-6 * rng.normal(size=x.shape) for x in (lhs, rhs)]
        difference = f(lhs + step[0], rhs + step[1]) - f(lhs - step[0], rhs - step[1])
        np.testing.assert_allclose(
            difference, 2 * sum(jnp.vdot(g, s) for g, s in zip(grads, step, strict=True)), rtol=1e-6
        )


def dense_layer(x, router, experts, top_k):
    weights, ids = route(x @ router, top_k)
    every = jnp.einsum("md,edf->mef", x, experts)
    return jnp.sum(jnp.take_along_axis(every, ids[..., None], 1) * weights[..., None], 1)


def sparse_layer(x, router, experts, top_k):
    weights, ids = route(x @ router, top_k)
    rows, sizes, undo = permute(x, ids, experts.shape[0])
    return combine(grouped_matmul(rows, experts, sizes), undo, weights)


def test_layer_matches_the_dense_one_under_scan_and_remat():
    """In float64: in fp32 a near tie between experts may fall either way."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(40, 8)))
        router, experts = (jnp.asarray(rng.normal(size=s)) for s in [(2, 8, 5), (2, 5, 8, 8)])

        def model(layer):
            def run(x, router, experts):
                body = jax.checkpoint(lambda h, w: (h + layer(h, *w, 2), None))
                return jnp.sum(jnp.sin(jax.lax.scan(body, x, (router, experts))[0]))

            return jax.jit(jax.value_and_grad(run, (0, 1, 2)))(x, router, experts)

        for a, b in zip(jax.tree.leaves(model(sparse_layer)), jax.tree.leaves(model(dense_layer)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_route_by_hand():
    """softmax(log(1, 2, 1)) = (1/4, 1/2, 1/4): the tie goes to expert 0."""
    logits = jnp.log(jnp.array([[1.0, 2.0, 1.0]]))
    weights, ids = route(logits, 2)
    np.testing.assert_array_equal(ids, [[1, 0]])
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, normalise=False)[0], [[0.5, 0.25]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"top_k=4 must lie in 1 .. 3"):
        route(logits, 4)


def test_permute_by_hand_and_drops():
    """Choices in flat order: experts 1 0 | 1 9 | -1 0; sorted: 0 0 1 1, then the two dropped."""
    x = jnp.array([[1.0], [2.0], [3.0]])
    rows, sizes, undo = permute(x, jnp.array([[1, 0], [1, 9], [-1, 0]]), 2)
    np.testing.assert_array_equal(rows[:, 0], [1, 3, 1, 2, 2, 3])
    np.testing.assert_array_equal(sizes, [2, 2])
    np.testing.assert_array_equal(undo.inverse, [[2, 0], [3, 4], [5, 1]])
    out = combine(grouped_matmul(rows, jnp.array([[[1.0]], [[10.0]]]), sizes), undo, jnp.ones((3, 2)))
    np.testing.assert_array_equal(out[:, 0], [11.0, 20.0, 3.0])


def test_errors_name_the_argument():
    lhs, rhs = operands()
    sizes = jnp.array(GROUPS["one"])
    with pytest.raises(ValueError, match=r"K=5.*transpose_rhs=False"):
        grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)
    with pytest.raises(ValueError, match=r'implementation="mosaic".*"ragged_dot"'):
        grouped_matmul(lhs, rhs, sizes, implementation="mosaic")
