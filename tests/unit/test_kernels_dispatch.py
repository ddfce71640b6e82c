"""What kernels have in common: a type of their own for what differs between devices, and inside shard_map at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from kernels.decode_attention import decode_attention
from kernels.decode_attention.public import IMPLEMENTATIONS as ATTENTION
from kernels.entropy_covariance import chunked_xla, token_statistics
from kernels.entropy_covariance.public import IMPLEMENTATIONS as STATISTICS
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.public import IMPLEMENTATIONS as PRODUCTS

BF16, INT = jnp.bfloat16, jnp.int32
SHAPES = {
    "grouped_matmul": [((128, 64), BF16), ((4, 64, 64), BF16), ((4,), INT)],
    "grouped_swiglu": [((128, 64), BF16), ((4, 64, 64), BF16), ((4, 64, 64), BF16), ((4,), INT)],
    "token_statistics": [((128, 64), BF16), ((64, 128), BF16), ((128,), INT)],
    "decode_attention": [((8, 4, 64), BF16), ((8, 16, 2, 64), BF16), ((8, 16, 2, 64), BF16), ((8,), INT)],
}


def run(op, name, *arguments):
    if op == "grouped_matmul":
        return grouped_matmul(*arguments, implementation=name)
    if op == "grouped_swiglu":
        return grouped_swiglu(*arguments, implementation=name)
    if op == "token_statistics":
        return token_statistics(*arguments, temperature=1.0, implementation=name).logprob
    return decode_attention(*arguments[:3], lengths=arguments[3], implementation=name)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, names in zip(SHAPES, (PRODUCTS, PRODUCTS, STATISTICS, ATTENTION), strict=True)
        for name in (*names, None)
    ],
)
def test_every_implementation_traces_inside_shard_map(op, name):
    """Each device with operands of its own: the result differs between devices, and says so."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    one = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in SHAPES[op]]
    four = [jax.ShapeDtypeStruct((4 * x.shape[0], *x.shape[1:]), x.dtype) for x in one]
    function = functools.partial(run, op, name)

    def typed(*arguments):
        out = function(*arguments)
        assert "x" in jax.typeof(out).manual_axis_type.varying
        return out

    sharded = jax.shard_map(typed, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    out, alone = jax.eval_shape(sharded, *four), jax.eval_shape(function, *one)
    assert out.shape == (4 * alone.shape[0], *alone.shape[1:]) and out.dtype == alone.dtype


@pytest.mark.parametrize("name", ["ragged_dot", "batched_xla", "blocked_xla", None])
def test_experts_that_all_devices_share_get_the_sum_of_their_gradients(name):
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, 5), (3, 5, 4)))
    sizes = jnp.asarray([[3, 0, 5], [8, 0, 0], [1, 1, 1], [0, 0, 0]])  # of each device's eight rows

    def loss(lhs, rhs, sizes):
        return (grouped_matmul(lhs, rhs, sizes.reshape(-1), implementation=name) ** 2).sum(1)

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P("x"))
    one_by_one = lambda lhs, rhs, sizes: jnp.concatenate(
        [loss(part, rhs, own) for part, own in zip(lhs.reshape(4, 8, 5), sizes, strict=True)]
    )
    gradients = lambda f: jax.jit(jax.grad(lambda a, b: f(a, b, sizes).sum(), (0, 1)))(lhs, rhs)
    for found, wanted in zip(gradients(sharded), gradients(one_by_one), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "row_blocks_xla", "chunked_xla"])
def test_a_head_that_all_devices_share_gets_the_sum_of_their_gradients(name, monkeypatch):
    monkeypatch.setattr(chunked_xla, "block_width", lambda *_: 40)  # two blocks and a narrower one
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 8), (8, 96)))
    targets = jnp.asarray(rng.integers(0, 96, 16))

    def loss(hidden, weight, targets):
        out = token_statistics(hidden, weight, targets, temperature=1.0, implementation=name)
        return out.logprob + 0.3 * out.entropy

    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P("x"))
    gradients = lambda f: jax.jit(jax.grad(lambda h, w: f(h, w, targets).sum(), (0, 1)))(hidden, weight)
    for found, wanted in zip(gradients(sharded), gradients(loss), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_varying_changes_a_type_and_no_number():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    def total(x, start):
        return jax.lax.fori_loop(0, 3, lambda i, carry: carry + x, dispatch.varying(start, x))

    np.testing.assert_array_equal(total(jnp.arange(4.0), jnp.ones(1)), [1, 4, 7, 10])
    assert dispatch.varying(jnp.ones(2), jnp.ones(3)).shape == (2,)  # nothing to do outside
    with pytest.raises(TypeError, match="carry"):
        jax.shard_map(
            lambda x, start: jax.lax.fori_loop(0, 3, lambda i, carry: carry + x, start),
            mesh=mesh,
            in_specs=(P("x"), P()),
            out_specs=P("x"),
        )(jnp.arange(4.0), jnp.ones(1))
    nothing = jnp.zeros((0, 3))
    assert dispatch.result((2,), jnp.float32, nothing).shape == (2,)
