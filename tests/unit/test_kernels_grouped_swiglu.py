"""grouped_swiglu: what it means, its gradients, transformations; its Hopper kernel is beside that of grouped_matmul."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.public import IMPLEMENTATIONS
from tests.support import portable

NAMES = portable(IMPLEMENTATIONS)  # None, the default, is what the other tests run
M, K, N, E = 90, 7, 5, 6
GROUPS = {"uneven": [10, 0, 29, 31, 7, 13], "below M": [5, 0, 0, 40, 1, 0], "none": [0] * 6}


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def operands(dtype=np.float32, rows=M):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((rows, K), (E, K, N), (E, K, N)))


def oracle(lhs, gate, up, sizes):
    out, at = np.zeros((lhs.shape[0], gate.shape[2])), 0
    for e, size in enumerate(sizes):
        a, b = (np.asarray(lhs[at : at + size], np.float64) @ np.asarray(w[e], np.float64) for w in (gate, up))
        out[at : at + size] = a / (1 + np.exp(-a)) * b
        at += size
    return out


def unfused(lhs, gate, up, sizes, name=None):
    product = functools.partial(grouped_matmul, group_sizes=sizes, implementation=name)
    return jax.nn.silu(product(lhs, gate)) * product(lhs, up)


@functools.partial(jax.jit, static_argnames=("run", "name"))
def value_and_gradients(run, name, g, sizes, *operands):
    out, pull = jax.vjp(lambda *operands: run(*operands, sizes, name), *operands)
    return out, *pull(g.astype(out.dtype))


def swiglu(lhs, gate, up, sizes, name=None):
    return grouped_swiglu(lhs, gate, up, sizes, implementation=name)


def close(found, wanted, **tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", GROUPS)
def test_forward_and_gradients(name, groups):
    """Rows beyond the groups hold NaN and take no part."""
    sizes = GROUPS[groups]
    lhs, gate, up = operands()
    lhs = lhs.at[sum(sizes) :].set(jnp.nan)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(M, N)), jnp.float32)
    out, *grads = value_and_gradients(swiglu, name, g, jnp.array(sizes), lhs, gate, up)
    close(out, oracle(lhs, gate, up, sizes), rtol=1e-5, atol=1e-5)
    assert not out[sum(sizes) :].any() and not grads[0][sum(sizes) :].any()
    close(grads, value_and_gradients(unfused, name, g, jnp.array(sizes), lhs, gate, up)[1:], rtol=1e-4, atol=1e-4)


def test_gradients_by_finite_differences(x64):
    arrays, sizes, rng = operands(np.float64), jnp.array(GROUPS["below M"]), np.random.default_rng(1)
    f = jax.jit(lambda *arrays: jnp.sum(jnp.sin(swiglu(*arrays, sizes))))
    grads = jax.grad(f, (0, 1, 2))(*arrays)
    steps = [1e-6 * rng.normal(size=x.shape) for x in arrays]
    difference = f(*(x + d for x, d in zip(arrays, steps, strict=True)))
    difference -= f(*(x - d for x, d in zip(arrays, steps, strict=True)))
    assert difference.dtype == np.float64
    np.testing.assert_allclose(difference, 2 * sum(map(jnp.vdot, grads, steps)), rtol=1e-6)


def test_dtypes():
    """Gradients have the type of their operand; of bf16 the join's derivative is fp32's, which that of bf16 is near."""
    sizes, g = jnp.array(GROUPS["uneven"]), jnp.ones((M, N))
    arrays = operands(jnp.bfloat16)
    found = value_and_gradients(swiglu, None, g, sizes, *arrays)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    wanted = value_and_gradients(unfused, None, g, sizes, *(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-6, atol=2**-6 * float(jnp.abs(b).max()))
    lhs, gate, up = arrays
    mixed = jax.eval_shape(
        functools.partial(value_and_gradients, swiglu, None), g, sizes, lhs, gate.astype(jnp.float32), up
    )
    assert [x.dtype for x in mixed] == [jnp.float32, jnp.bfloat16, jnp.float32, jnp.bfloat16]


def test_under_scan_and_remat(x64):
    sizes, rng = jnp.array(GROUPS["below M"]), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(M, K)))
    layers = tuple(jnp.asarray(rng.normal(size=(2, *shape))) for shape in ((E, K, N), (E, K, N), (N, K)))

    def model(run, remat):
        def body(h, layer):
            gate, up, down = layer
            return h + jnp.cos(run(h, gate, up, sizes)) @ down, None

        loss = lambda x, layers: jnp.sum(jnp.sin(jax.lax.scan(remat(body), x, layers)[0]))
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, layers)

    close(model(swiglu, jax.checkpoint), model(unfused, lambda body: body), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("remat", [lambda f: f, jax.checkpoint], ids=["keep", "remat"])
def test_experts_that_all_devices_share_get_the_sum_of_their_gradients(remat):
    lhs, gate, up = operands(rows=32)
    sizes = jnp.asarray([[3, 0, 5, 0, 0, 0], [0, 8, 0, 0, 0, 0], [1] * 6, [0] * 6])  # of each device's eight rows
    own = lambda run: lambda lhs, gate, up, sizes: run(lhs, gate, up, sizes.reshape(-1))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    specs = P("x"), P(), P(), P("x")
    sharded = remat(jax.shard_map(own(swiglu), mesh=mesh, in_specs=specs, out_specs=P("x")))
    one_by_one = lambda lhs, gate, up, sizes: jnp.concatenate(
        [own(unfused)(part, gate, up, s) for part, s in zip(lhs.reshape(4, 8, K), sizes, strict=True)]
    )
    gradients = lambda f: jax.jit(jax.grad(lambda *x: (f(*x, sizes) ** 2).sum(), (0, 1, 2)))(lhs, gate, up)
    close(gradients(sharded), gradients(one_by_one), rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    lhs, gate, up = operands()
    sizes = jnp.array(GROUPS["uneven"])
    for arguments, message in (
        ((lhs, gate, up[:, :, 1:], sizes), r"gate \(6, 7, 5\) and up \(6, 7, 4\).*one shape"),
        ((lhs[:, 1:], gate, up, sizes), r"\(6, 7, 5\).*E=6.*K=6, the columns of lhs \(90, 6\)"),
        ((lhs, gate, up, sizes[:4]), r"\(6, 7, 5\).*E=4, the length of group_sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_swiglu(*arguments)
    with pytest.raises(ValueError, match=r'grouped_swiglu: implementation="mosaic".*"ragged_dot"'):
        swiglu(lhs, gate, up, sizes, "mosaic")
