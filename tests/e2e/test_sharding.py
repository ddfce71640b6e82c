"""Four devices, in any mesh, are one device: same tokens, same weights, every group scored once, replicas equal."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_reason import build, rewards, sharding
from rl_reason.loop.engine import Fused
from rl_reason.loop.step import learn_phase, sample_phase
from rl_reason.processes import to_global
from rl_reason.types import Rollout
from tests import support
from tests.e2e import loops

STEPS = 2
FP32_GRADIENT_TOLERANCE = 1e-5  # of its norm, on replayed rollouts
MESHES = [dict(fsdp=4), dict(data=2, tensor=2), dict(data=2, fsdp=2), dict(data=2, expert=2)]


@pytest.fixture(autouse=True)
def float64(request):
    """Double precision, but where a test says otherwise."""
    with jax.enable_x64("fp32" not in request.node.name):
        yield


def name(sizes) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def parts_on(mesh, dtype: str = "float64", moe: bool = False, **plan):
    """Eight prompts in groups of two over the mesh's row shards."""
    shards = sharding.num_row_shards(mesh)
    model = dict(num_layers=1, dtype=dtype, param_dtype=dtype) | (support.MOE if moe else {})
    sizes = dict(prompts_per_step=8, generated_prompts=8, minibatches=2, row_shards=shards) | plan
    parts = support.tiny_parts("clipcov", model=model, **sizes)
    return dataclasses.replace(parts, log_groups=-1)


def start_on(mesh, parts):
    """The state of ``loops.start``, placed by the partition rules."""
    return jax.device_put(loops.start(parts), build.state_shardings(parts, mesh))


def train(mesh, parts, verify, steps: int = STEPS):
    """Some fused steps on a mesh, prompts cut over it as a run cuts them."""
    with jax.set_mesh(mesh):
        prompts = jax.tree.map(np.asarray, loops.stacked(parts, steps))
        prompts = to_global(prompts, build.rows_sharding(mesh, leading=1))
        return Fused(parts, verify).advance(start_on(mesh, parts), prompts, loops.LIVE)


@functools.cache
def on_one_device(moe: bool):
    """The reference."""
    mesh = loops.mesh_of()
    return train(mesh, parts_on(mesh, moe=moe), support.parity_verify)


@pytest.mark.parametrize("sizes", [pytest.param(MESHES[0], marks=pytest.mark.slow), *MESHES[1:]], ids=name)
def test_a_mesh_trains_as_one_device_does(sizes):
    mesh, moe = loops.mesh_of(jax.devices(), **sizes), "expert" in sizes
    out, expected = train(mesh, parts_on(mesh, moe=moe), support.parity_verify), on_one_device(moe)
    np.testing.assert_array_equal(out.sampled.tokens, expected.sampled.tokens)
    assert loops.distance(out.state.params, expected.state.params) < 1e-10
    assert 0 < np.mean(expected.sampled.correct) < 1
    assert loops.distance(expected.state.params, loops.start(parts_on(mesh, moe=moe)).params) > 1e-4
    cut = [x.sharding.is_fully_replicated for x in jax.tree.leaves(out.state.params)]
    assert not all(cut) or sizes == dict(data=4), "no weight was cut"


def gradient(mesh, parts, prompts, rollout):
    """What one plain descent step takes off the parameters."""
    parts = dataclasses.replace(parts, optimizer=optax.sgd(1.0), schedule=lambda _: 1.0)
    verdicts = support.parity_verify(rollout, prompts)
    with jax.set_mesh(mesh):
        rows = build.rows_sharding(mesh)
        placed = jax.tree.map(lambda x: jax.device_put(np.asarray(x), rows), (prompts, rollout, verdicts))
        state = start_on(mesh, parts)
        learn = jax.jit(functools.partial(learn_phase, parts))
        new, *_ = learn(state, *placed, jnp.int32(1), loops.LIVE)
        return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.params, new.params)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2), dict(data=2, tensor=2)], ids=name)
def test_fp32_gradients_on_replayed_rollouts(sizes):
    one = loops.mesh_of()
    parts = parts_on(one, "float32", minibatches=1)
    prompts = loops.prompts_of(parts, 0)
    rollout, _ = jax.jit(functools.partial(sample_phase, parts))(loops.start(parts), prompts, loops.LIVE)
    expected = gradient(one, parts, prompts, rollout)
    mesh = loops.mesh_of(jax.devices(), **sizes)
    got = gradient(mesh, parts_on(mesh, "float32", minibatches=1), prompts, rollout)
    size = float(optax.tree.norm(expected))
    assert size > 1e-3
    assert float(optax.tree.norm(jax.tree.map(np.subtract, got, expected))) < FP32_GRADIENT_TOLERANCE * size


@functools.cache
def with_random_verdicts():
    """(host, out) of a run on data=2, tensor=2 whose verifier tosses a coin at every row it is shown."""
    rng = np.random.default_rng(0)

    def toss(tokens, completion_mask, uid):
        return rng.integers(0, 2, len(uid)).astype(np.float32), rng.random(len(uid)) < 0.9

    mesh, host = loops.mesh_of(jax.devices(), data=2, tensor=2), loops.HostVerdicts(toss)
    parts = parts_on(mesh)
    verify = rewards.by_callback(host, mesh, group_size=parts.plan.group_size)
    return host, parts, train(mesh, parts, verify, steps=3)


def test_each_group_is_scored_once():
    host, parts, _ = with_random_verdicts()
    asked = collections.Counter(int(uid) for uids in host.asked for uid in uids)
    assert asked == dict.fromkeys(range(3 * parts.plan.prompts_drawn), parts.plan.group_size)
    for uids in host.asked:  # a group is never split over two questions
        assert set(collections.Counter(uids.tolist()).values()) == {parts.plan.group_size}


def test_random_verdicts_leave_replicas_equal():
    _, _, out = with_random_verdicts()
    compared = 0
    for x in jax.tree.leaves((out.state.params, out.state.opt_state)):
        replicas = {}
        for shard in x.addressable_shards:
            first = replicas.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(np.asarray(shard.data), first)
            compared += shard.replica_id > 0
    assert compared > 20


def test_a_mebibyte_a_shard_passes_through_a_callback():
    """jax 0.10.2 hangs here when NPROC is too small; see rewards.check_callback_threads."""
    rows, width = 4 * 64, 4096  # of int32: 1 MiB a shard
    mesh = loops.mesh_of(jax.devices(), data=4)
    seen = []

    def score(tokens, completion_mask, uid):
        seen.append(tokens.nbytes)
        return tokens.astype(np.int64).sum(1) % 7 / 7, np.ones(len(uid), bool)

    tokens = np.random.default_rng(0).integers(0, 1000, (rows, width), np.int32)
    nothing = jnp.zeros((rows, width), jnp.float32)
    flags = jnp.zeros(rows, bool)
    rollout = Rollout(
        tokens=jnp.asarray(tokens),
        prompt_len=jnp.ones(rows, jnp.int32),
        completion_mask=jnp.ones((rows, width), bool),
        rollout_logprobs=nothing,
        sampled_logprobs=nothing,
        prompt_id=jnp.arange(rows, dtype=jnp.int32),
        truncated=flags,
        off_policy=flags,
    )
    verify = jax.jit(rewards.by_callback(score, mesh, group_size=1))
    with jax.set_mesh(mesh):
        verdicts = verify(rollout, support.tiny_prompts(rows))
    np.testing.assert_allclose(verdicts.score, tokens.astype(np.int64).sum(1) % 7 / 7, rtol=1e-6)
    assert seen == [2**20] * 4 and bool(verdicts.valid.all())
