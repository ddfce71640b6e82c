"""Sampling on a mesh: the same tokens in either layout of the weights, and what a decode step sends between devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import build, sharding
from rl_reason.models.cached_attention import attend_cached
from rl_reason.rollout import RolloutConfig, check, generate
from rl_reason.sampling import make_sampling
from tests import hlo, support

VOCAB = 64
MODEL = dict(vocab_size=VOCAB, num_layers=2, scan_layers=True, scan_decode=True, tie_embeddings=False)
MESHES = {"dense": dict(fsdp=2, tensor=2), "moe": dict(fsdp=2, expert=2)}
IN_LAYERS = 3  # while loops around a layer of a decode step: until all are done, check_every steps, layers


def model(kind: str):
    return support.tiny_model(**MODEL, **support.FLOAT64, **(support.MOE if kind == "moe" else {}))


@functools.cache
def compiled(kind: str, layout: str, alone: bool = False):
    """(program, parameters, prompts) of a rollout, placed as a run places them."""
    mesh = sharding.make_mesh({} if alone else MESHES[kind], jax.devices()[:1] if alone else None)
    rollout = RolloutConfig(
        group_size=2,
        completion_len=6,
        num_slots=8,
        check_every=2,
        prefill_rows=0,
        eos_id=support.EOS,
        pad_id=support.PAD,
        num_shards=sharding.num_row_shards(mesh),
        layout=layout,
    )
    params = support.tiny_params(model(kind))
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    prompts = jax.device_put(support.tiny_prompts(8, vocab=VOCAB), build.rows_sharding(mesh))
    run = lambda params, prompts, key: generate(params, prompts, key, make_sampling(1.0), model(kind), rollout)[0]
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(params, prompts, jax.random.key(0)).compile(), params, prompts


def tokens(*which):
    program, params, prompts = compiled(*which)
    return np.asarray(program(params, prompts, jax.random.key(0)).tokens)


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_layouts_draw_the_same_tokens_and_gather_weights_once(kind, x64):
    alone = tokens(kind, "train", True)
    np.testing.assert_array_equal(tokens(kind, "train"), alone)
    np.testing.assert_array_equal(tokens(kind, "decode"), alone)
    sent = {layout: hlo.collectives(compiled(kind, layout)[0].as_text()) for layout in ("train", "decode")}
    resident = sharding.bytes_per_device(compiled(kind, "train")[1], sharding.make_mesh(MESHES[kind]), resident=True)
    weights = sum(size for name, size in resident.items() if name.startswith("layers") and "norm" not in name)
    gathered = {
        layout: sum(
            n * size for (loops, op, _), (n, size) in found.items() if (loops, op) == (IN_LAYERS, "all-gather")
        )
        for layout, found in sent.items()
    }
    met = 4 * (8 * 8 + 2 * 8 + 2 * 4) if kind == "moe" else 0  # x, weights and ids of the tokens of two devices
    assert gathered == dict(train=weights // MODEL["num_layers"] + met, decode=met)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (3, 1)], ids=["cut", "shared", "whole"])
@pytest.mark.parametrize("layer", [None, 1])
def test_attention_of_caches_over_rows_and_heads(heads, kv_heads, layer):
    """Two devices each for rows and heads, against one: nothing crosses between them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    stack = () if layer is None else (2,)
    new = draw(4, heads, 8), draw(4, kv_heads, 8), draw(4, kv_heads, 8)
    caches = [tuple(draw(*stack, rows, size, kv_heads, 8) for _ in "kv") for rows, size in ((4, 5), (4, 3))]
    counts, lens, index = jnp.array([0, 2, 4, 1]), jnp.array([3, 1, 0, 2]), jnp.array([1, 0, 0, 1])
    run = functools.partial(attend_cached, num_shards=2, window=3, scale=0.4, soft_cap=None)
    arguments = *new, *caches, counts, lens, index, None if layer is None else jnp.int32(layer)
    expected = jax.jit(run)(*arguments)
    with jax.set_mesh(sharding.make_mesh(dict(fsdp=2, tensor=2))):
        program = jax.jit(run).lower(*arguments).compile()
    got = program(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_an_unknown_layout():
    rollout = RolloutConfig(2, 6, 8, 2, 0, support.EOS, support.PAD, layout="fast")
    with pytest.raises(ValueError, match=r"config.rollout.layout='fast'; there are train, decode"):
        check(rollout, 8)
