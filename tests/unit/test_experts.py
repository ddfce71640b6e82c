"""Experts cut over a mesh are those of one device: sums, gradients, and what crosses between devices for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rl_reason import sharding
from rl_reason.models import experts as experts_lib
from rl_reason.models.experts import Experts, apply_experts
from tests import support

TOKENS, TOP_K, NUM_EXPERTS, HIDDEN, MLP = 64, 2, 4, 8, 12
MESHES = [dict(fsdp=2, expert=2), dict(tensor=2, expert=2)]
MORE_MESHES = [dict(data=2, expert=2), dict(expert=4), dict(data=2, fsdp=2), dict(fsdp=2, tensor=2)]


def name(sizes) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def operands(tokens: int = TOKENS, num_experts: int = NUM_EXPERTS, mlp: int = MLP, popular: bool = False):
    """(x, weights, experts, ids), float64; ``popular`` has everybody choose experts 0 and 1."""
    rng = np.random.default_rng(0)
    ids = [range(TOP_K) if popular else rng.permutation(num_experts)[:TOP_K] for _ in range(tokens)]
    shapes = (num_experts, HIDDEN, mlp), (num_experts, HIDDEN, mlp), (num_experts, mlp, HIDDEN)
    experts = Experts(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
    x, weights = (jnp.asarray(rng.normal(size=(tokens, width))) for width in (HIDDEN, TOP_K))
    return x, weights, experts, jnp.asarray(np.array([list(row) for row in ids]), jnp.int32)


def loss(x, weights, experts, ids):
    return jnp.sum(apply_experts(x, weights, ids, experts) ** 3)


def gradients(*arguments):
    """Value and gradients, under remat as in a model."""
    return jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2)))(*arguments)


def assert_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-10)


def on_mesh(sizes, *arguments):
    with jax.set_mesh(sharding.make_mesh(sizes)):
        return gradients(*arguments)


@pytest.mark.parametrize("sizes", [*MESHES, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_MESHES)], ids=name)
def test_a_mesh_gives_what_one_device_gives(sizes, x64):
    """62 tokens do not divide by four devices: padded by tokens that choose nobody."""
    arguments = operands(62 if "fsdp" in sizes else TOKENS)
    assert_close(on_mesh(sizes, *arguments), gradients(*arguments))


@pytest.mark.parametrize("popular", [pytest.param(False, marks=pytest.mark.slow), True])
def test_popular_experts_take_more_turns_and_lose_nothing(popular, x64, monkeypatch):
    """Device 0 has the experts that all want: 128 choices, of which a turn takes 1.5 shares of 64."""
    monkeypatch.setattr(experts_lib, "MIN_ROWS", 0)
    arguments = operands(popular=popular)
    mesh = sharding.make_mesh(dict(expert=2), jax.devices()[:2])

    def count(ids):
        first = jax.lax.axis_index("expert") * (NUM_EXPERTS // 2)
        return experts_lib._turns(ids - first, NUM_EXPERTS // 2)[0][None]

    turns = jax.shard_map(count, mesh=mesh, in_specs=P(), out_specs=P("expert"))(arguments[-1])
    assert turns.tolist() == ([2, 0] if popular else [1, 1])
    with jax.set_mesh(mesh):
        got = gradients(*arguments)
    assert_close(got, gradients(*arguments))


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=2, expert=2), pytest.param(dict(tensor=2, expert=2), marks=pytest.mark.slow)]
)
def test_tokens_meet_a_piece_at_a_time(sizes, x64, monkeypatch):
    """64 tokens, in 4 shards of 16 or in 2 of 32: 4 or 7 pieces of at most 5, the last ones filled up."""
    monkeypatch.setattr(experts_lib, "MAX_TOKENS", 5)
    arguments = operands()
    whole = gradients(*arguments)
    assert_close(on_mesh(sizes, *arguments), whole)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        text = jax.jit(loss).lower(*arguments).as_text()
    assert f"tensor<{experts_lib.MAX_TOKENS * 2 - 2 if 'fsdp' in sizes else 10}x{HIDDEN}xf64>" in text


@pytest.mark.slow
def test_an_expert_that_tensor_does_not_divide_stays_whole(x64):
    arguments = operands(mlp=11)
    assert_close(on_mesh(dict(tensor=2, expert=2), *arguments), gradients(*arguments))


def test_experts_have_to_divide():
    with pytest.raises(ValueError, match=r"num_experts=6 cannot be cut over mesh.expert=4 devices; make it a divisor"):
        on_mesh(dict(expert=4), *operands(num_experts=6))


def lowered(platform: str, mesh, dtype) -> str:
    """A forward and backward pass for a platform, on a mesh."""
    cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))
        return run.trace(*jax.tree.map(cast, operands())).lower(lowering_platforms=(platform,)).as_text()


def test_kernels_are_used_over_several_devices():
    """For a TPU: three products forward; backward two again, three gradients of rows and three of weights."""
    text = lowered("tpu", sharding.make_mesh(dict(fsdp=2, expert=2)), jnp.bfloat16)
    assert support.kernel_calls(text, "tpu_custom_call") >= 11 and "ragged_dot" not in text


def collectives(text: str) -> dict[str, int]:
    return {op: text.count(f"stablehlo.{op}") for op in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")}


def test_what_crosses_between_devices():
    """Forward x, weights, ids; backward these and the cotangent; home go the sum, d_x, d_weights; gradients of three weights
    are scattered over fsdp and summed over data. XLA gathers the weights themselves, over fsdp, where shard_map begins."""
    text = lowered("cpu", sharding.make_mesh(dict(fsdp=2, expert=2)), jnp.float32)
    assert collectives(text) == dict(all_gather=3 + 4, reduce_scatter=1 + 2 + 3, all_reduce=3 + 3, all_to_all=0)


def test_weights_are_gathered_over_fsdp_alone():
    """[2 of 4 experts, 8, 12]: whole matrices, of a device's own experts."""
    mesh = sharding.make_mesh(dict(fsdp=2, expert=2))
    x, weights, experts, ids = operands()
    place = lambda x, *spec: jax.device_put(x.astype(jnp.float32), NamedSharding(mesh, P(*spec)))
    spec = lambda name, w: sharding.param_spec(f"layers/moe/{name}", (1, *w.shape), mesh)[1:]
    experts = Experts(*(place(w, *spec(n, w)) for n, w in zip(Experts._fields, experts, strict=True)))
    with jax.set_mesh(mesh):
        text = jax.jit(loss).lower(x, weights, experts, ids).compile().as_text()
    assert text is not None and "f32[2,8,12]" in text and "f32[4,8,12]" not in text and "f32[4,12,8]" not in text
