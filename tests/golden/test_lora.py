"""Low-rank adapters: numbers by hand, and what a run with them leaves alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import build, sharding
from rl_reason.loop.chunk import make_step
from rl_reason.models import lora, transformer
from rl_reason.models.lora import Lora
from rl_reason.rollout import generate
from rl_reason.sampling import make_sampling
from rl_reason.sharding import path_name
from tests.support import (
    FLOAT64,
    MOE,
    load_config,
    one_device,
    parity_verify,
    tiny_model,
    tiny_params,
    tiny_parts,
    tiny_prompts,
)

RANK_2 = Lora(rank=2, alpha=6.0, targets=("attention", "mlp"), merge_to_sample=True)


def paths(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_an_adapted_product_and_its_gradients_by_hand():
    # W = [[1], [1]], A = [[1], [3]], B = [[2]], alpha / rank = 1/2, x = (1, 2): x W = 3, x A = 7, y = 3 + 7 * 2 / 2 = 10.
    # dy/dB = 7/2; dy/dA = x B / 2 = (1, 2).
    params = {"kernel": jnp.ones((2, 1)), "lora_a": jnp.array([[1.0], [3.0]]), "lora_b": jnp.array([[2.0]])}
    x, scale = jnp.array([[1.0, 2.0]]), jnp.array(0.5)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lora.linear(nn.Dense(1, use_bias=False, name="q"), x)

    def run(a, b):
        adapted = params | {"lora_a": a, "lora_b": b, "lora_scale": scale}
        return jnp.sum(jnp.asarray(Model().apply({"params": {"q": adapted}}, x)))

    y, slopes = jax.value_and_grad(run, (0, 1))(params["lora_a"], params["lora_b"])
    assert float(y) == 10.0
    np.testing.assert_array_equal(slopes[0], [[1.0], [2.0]])
    np.testing.assert_array_equal(slopes[1], [[3.5]])
    # W + A B / 2 = [[2], [4]], whether of one layer or of a stack of two, whose second has W = 0.
    one = params | {"lora_scale": scale}
    np.testing.assert_array_equal(lora.merged({"q": one})["q"]["kernel"], [[2.0], [4.0]])
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    stack["kernel"] = stack["kernel"].at[1].set(0.0)
    np.testing.assert_array_equal(lora.merged({"q": stack})["q"]["kernel"], [[[2.0], [4.0]], [[1.0], [3.0]]])


def test_fresh_adapters_change_nothing_and_are_in_fp32():
    model = tiny_model(param_dtype="bfloat16")
    params = tiny_params(model)
    adapted = lora.add(jax.random.key(0), params, RANK_2)
    found = paths(adapted)
    q, out, down = (found[f"layers/{name}/lora_a"] for name in ("attention/q", "attention/out", "mlp/down"))
    assert (q.shape, out.shape, down.shape) == ((2, 8, 2), (2, 4, 4, 2), (2, 12, 2))
    assert found["layers/attention/q/lora_b"].shape == (2, 2, 4, 4)
    assert found["layers/attention/out/lora_b"].shape == (2, 2, 8)
    assert {x.dtype for path, x in found.items() if "lora_" in path} == {jnp.dtype("float32")}
    # Uniform in +-16^-0.5 of 64 numbers: the largest is between 0.2 and 0.25 (but once in 10^6).
    assert 0.2 < float(jnp.abs(out).max()) <= 0.25 and not float(jnp.abs(found["layers/mlp/up/lora_b"]).max())
    tokens = jnp.arange(10).reshape(2, 5)
    hidden = jax.jit(lambda params: transformer.forward(params, tokens, tokens >= 0, model).hidden)
    np.testing.assert_array_equal(hidden(adapted), hidden(params))
    for same in (lora.base(adapted), lora.merged(adapted)):
        assert jax.tree.structure(same) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, same, params)
    assert lora.base(adapted)["layers"]["mlp"]["up"]["kernel"] is params["layers"]["mlp"]["up"]["kernel"]  # no copy


def stirred(params):
    """With a B that is not 0."""
    rng = np.random.default_rng(1)
    stir = lambda path, x: x + 0.3 * rng.normal(size=x.shape) if path_name(path).endswith("lora_b") else x
    return jax.tree_util.tree_map_with_path(stir, params)


def test_a_step_moves_adapters_alone(x64):
    # With a KL term, whose reference is the base, of which no copy is kept: it is exactly 0 until adapters do something.
    config = load_config("grpo")
    config.lora.rank = 2
    parts = tiny_parts(config, FLOAT64 | dict(num_layers=1), minibatches=1, group_size=4, train_group_size=4)
    kl = dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0)
    parts = dataclasses.replace(parts, regularisers=dict(kl=kl))
    state = build.new_state(parts, tiny_params(parts.model, scale=1.5), 0)
    assert parts.wants("ref_logprobs") and state.ref_params is None
    learned = {path for path in paths(state.params) if path.endswith(("lora_a", "lora_b"))}
    moments = [path for path in paths(state.opt_state) if "/mu/" in path or "/nu/" in path]
    assert len(learned) == 14 and len(moments) == 28 and all(path.endswith(tuple(learned)) for path in moments)

    step = jax.jit(make_step(parts, parity_verify))
    prompts, sampling = tiny_prompts(4), make_sampling(1.0)
    assert float(step(state, prompts, sampling)[1][0]["actor/kl_loss"]) == 0.0
    state = dataclasses.replace(state, params=stirred(state.params))
    after, (metrics, _) = step(state, prompts, sampling)
    assert float(metrics["actor/grad_norm"]) > 1e-4 and float(metrics["actor/kl_loss"]) > 1e-3
    for path, x in paths(state.params).items():
        moved = float(jnp.abs(paths(after.params)[path] - x).max())
        assert (moved > 0) == (path in learned), path


@pytest.mark.parametrize("scanned", [False, True])
def test_merged_and_unmerged_sample_the_same(scanned, x64):
    parts = tiny_parts("base", FLOAT64 | dict(num_layers=1 + scanned, scan_layers=scanned, scan_decode=scanned))
    params = stirred(lora.add(jax.random.key(0), tiny_params(parts.model), RANK_2))

    def draw(params, merge):
        rollout = dataclasses.replace(parts.rollout, merge_adapters=merge)
        return generate(params, tiny_prompts(4), jax.random.key(0), make_sampling(1.0), parts.model, rollout)[0]

    draw = jax.jit(draw, static_argnums=1)
    want = draw(lora.merged(params), True)
    assert not np.array_equal(draw(lora.base(params), True).tokens, want.tokens)
    for merge in (True,) if scanned else (True, False):
        got = draw(params, merge)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.rollout_logprobs, want.rollout_logprobs, atol=1e-12)


def test_adapters_are_cut_as_their_kernels():
    mesh = sharding.make_mesh(dict(fsdp=2, tensor=2))
    placed = paths(build.placed_shapes(tiny_model(), RANK_2, mesh))
    for path, x in placed.items():
        if not path.endswith("/kernel"):
            continue
        kernel, inputs = list(x.sharding.spec), 2 if "/out/" in path else 1
        a, b = (list(placed[path.replace("kernel", name)].sharding.spec) for name in ("lora_a", "lora_b"))
        assert a[1 : 1 + inputs] == kernel[1 : 1 + inputs] and a[-1] is None, path
        assert b[1] is None and b[2:] == kernel[1 + inputs :], path
    assert not any(placed["layers/mlp/up/lora_scale"].sharding.spec)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(targets=("attn",)),
            "config.lora.targets: 'attn' matches none of the kernels .* layers/attention/k/kernel",
        ),
        (dict(rank=-1), "rank=-1 must be at least 1"),
        (dict(alpha=0.0), "alpha=0.0 above 0"),
    ],
)
def test_refusals(changes, message):
    config = load_config("base")
    config.lora.update(**(dict(rank=4) | changes))
    with pytest.raises(ValueError, match=message):
        build.build(config, one_device())


def test_experts_take_no_adapters():
    config = load_config("base")
    config.lora.rank = 4
    config.model.update(**MOE)
    with pytest.raises(ValueError, match=r"'mlp' matches none .* Routers, experts and embeddings take none"):
        build.build(config, one_device())
