"""The vocabulary head over a mesh is that of one device, and what it sends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rl_reason import sharding
from rl_reason.models.head import score_tokens
from tests import hlo

ROWS, HIDDEN, VOCAB = 16, 8, 24


def case(rows=ROWS, vocab=VOCAB):
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(2 * rng.normal(size=shape)) for shape in ((rows, HIDDEN), (HIDDEN, vocab)))
    return hidden, weight, jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)


def loss(hidden, weight, targets, soft_cap=None):
    logprob, entropy = score_tokens(hidden, weight, targets, 0.7, soft_cap)
    return jnp.sum(jnp.arange(len(targets)) * (logprob + 0.3 * entropy)), (logprob, entropy)


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        (dict(fsdp=2, tensor=2), {}),
        (dict(data=2, expert=2), {}),
        (dict(fsdp=2, tensor=2), dict(rows=15)),
        (dict(fsdp=2, tensor=2), dict(vocab=23)),
    ],
    ids=["tensor", "expert", "odd rows", "odd vocabulary"],
)
def test_a_mesh_scores_as_one_device_does(sizes, shapes, x64):
    run = jax.jit(jax.value_and_grad(functools.partial(loss, soft_cap=3.0), (0, 1), has_aux=True))
    expected = run(*case(**shapes))
    with jax.set_mesh(sharding.make_mesh(sizes)):
        got = run(*case(**shapes))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-10)


def test_certain_tokens_keep_their_digits():
    """fp32: a token of log-probability -2e-9 in one part, next to nothing in the other; errors are absolute."""
    hidden, weight = jnp.ones((4, 1)), jnp.zeros((1, 4)).at[0, 0].set(20.0)
    with jax.set_mesh(sharding.make_mesh(dict(tensor=2), jax.devices()[:2])):
        logprob, entropy = jax.jit(score_tokens, static_argnums=(3, 4))(
            hidden, weight, jnp.array([0, 1, 2, 3]), 1.0, None
        )
    np.testing.assert_allclose(logprob, [0, -20, -20, -20], atol=4e-6)
    np.testing.assert_allclose(entropy, 3 * 21 * np.exp(-20), atol=2e-7)


def test_the_head_is_gathered_once_and_no_logit_moves():
    """Parameters cut over fsdp and tensor: [8, 24] of which a device uses [8, 12], fp32."""
    mesh = sharding.make_mesh(dict(fsdp=2, tensor=2))
    stored = sharding.param_spec("unembed", (HIDDEN, VOCAB), mesh)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    hidden, weight, targets = case()
    placed = place(hidden, sharding.ROWS), place(weight, *stored), place(targets, sharding.ROWS)
    gradient = jax.grad(lambda *x: loss(*x)[0], (0, 1))
    with jax.set_mesh(mesh):
        out = NamedSharding(mesh, P(sharding.ROWS)), NamedSharding(mesh, stored)
        text = jax.jit(gradient, out_shardings=out).lower(*placed).compile().as_text()
    found = {(kind, shape): n for (_, kind, shape), (n, _) in hlo.collectives(text).items()}
    assert found["all-gather", f"f32[{HIDDEN},{VOCAB // 2}]"] == 1
    assert found["reduce-scatter", f"f32[{HIDDEN // 2},{VOCAB // 2}]"] == 1
    assert not [shape for _, shape in found if f"{ROWS},{VOCAB}]" in shape or f"{ROWS // 2},{VOCAB}]" in shape]
