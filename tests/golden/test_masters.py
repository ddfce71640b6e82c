"""Parameters in bfloat16 learn through fp32 masters: numbers by hand.

bf16 has 8 significant bits: its numbers from 1 to 2 are 2^-7 apart.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_reason import build, learning
from rl_reason.loop.optimizer import Masters, init_optimizer, optimizer_step
from rl_reason.loop.update import apply_gradient, streamed
from rl_reason.models.score import Scores
from tests.support import tiny_params, tiny_parts

SGD = optax.sgd(1.0)


@functools.partial(jax.jit, static_argnames="finite")
def step(params, state, grads, finite=True):
    ok = jnp.array(finite)
    return optimizer_step(SGD, params, state, grads, finite=ok, taken=ok)


def as_float32(x):
    return np.asarray(x.astype(jnp.float32))


def test_updates_that_bf16_would_lose_add_up():
    # 1 + 2^-10 is nearer to 1 than to the next number, 1 + 2^-7: in bf16 alone nothing ever moves. In fp32 four of these
    # are 1 + 2^-8, half way, which rounds to even, 1. The fifth is beyond, and eight are the next number itself.
    alone = params = jnp.ones(3, jnp.bfloat16)
    state, grads = init_optimizer(SGD, params), jnp.full(3, -(2.0**-10), jnp.bfloat16)
    want = {4: 1.0, 5: 1.0 + 2.0**-7, 8: 1.0 + 2.0**-7, 16: 1.0 + 2.0**-6}
    for count in range(1, 17):
        alone = optax.apply_updates(alone, -grads)
        params, state = step(params, state, grads)
        np.testing.assert_array_equal(state.params, np.float32(1.0 + count * 2.0**-10))
        if count in want:
            np.testing.assert_array_equal(as_float32(params), want[count])
    assert params.dtype == jnp.bfloat16 and state.params.dtype == jnp.float32
    np.testing.assert_array_equal(as_float32(alone), 1.0)


def test_parameters_are_exactly_the_masters_rounded():
    # The master goes from -3 + 2^-22 by 4 + 2^-8 to m = 1 + 2^-8 + 2^-22, all exact in fp32, and beyond half way: the
    # parameter becomes 1 + 2^-7. From the parameter, -3, the difference to m is 4 + 2^-8 + 2^-22, which fp32 rounds to
    # 4 + 2^-8: added as an update is, that is half way, and bf16 makes 1 of it.
    start = jnp.full(2, -3.0, jnp.bfloat16)
    masters = init_optimizer(SGD, start)._replace(params=jnp.full(2, -3.0 + 2.0**-22))
    params, state = step(start, masters, jnp.full(2, -(4.0 + 2.0**-8)))
    np.testing.assert_array_equal(state.params, np.float32(1.0 + 2.0**-8 + 2.0**-22))
    np.testing.assert_array_equal(as_float32(params), 1.0 + 2.0**-7)
    by_update = optax.apply_updates(start, state.params - start.astype(jnp.float32))
    np.testing.assert_array_equal(as_float32(by_update), 1.0)


def test_a_bad_gradient_leaves_masters_as_they_were():
    start = jnp.full(2, 0.1, jnp.bfloat16)
    before = init_optimizer(SGD, start)
    after = step(start, before, jnp.full(2, jnp.nan), finite=False)
    jax.tree.map(np.testing.assert_array_equal, after, (start, before))


def test_wide_parameters_have_no_masters(x64):
    for dtype in (jnp.float32, jnp.float64):
        assert not isinstance(init_optimizer(optax.adam(0.1), {"w": jnp.ones(2, dtype)}), Masters)


def test_gradients_of_microbatches_add_up_in_fp32():
    # The gradient of w (x_0 + x_1) with x = 1 and 2^-9 is their sum, which bf16 would round to 1.
    rows = jnp.array([[1.0], [2.0**-9]])
    run = lambda w, rows: Scores(logprobs=w.astype(jnp.float32) * rows, entropy=rows, router=None)
    loss_of = lambda scores: (scores.logprobs.sum(), {})
    *_, grads = streamed(run, loss_of, jnp.ones((), jnp.bfloat16), rows, 2)
    assert grads.dtype == jnp.float32 and float(grads) == 1.0 + 2.0**-9


def test_a_bf16_model_takes_the_steps_of_its_fp32_masters():
    # One gradient, the same for both: their masters and Adam's moments are then the same numbers, and the bf16 parameters
    # are those rounded, however many steps of a rate that bf16 cannot see.
    rate = optax.constant_schedule(1e-5)
    o = dict(grad_clip=1.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, mu_dtype=None)
    ends = []
    for dtype in ("bfloat16", "float32"):
        parts = dataclasses.replace(
            tiny_parts("base", dict(num_layers=1, param_dtype=dtype)), optimizer=learning.adamw(o, rate), schedule=rate
        )
        params = tiny_params(dataclasses.replace(parts.model, param_dtype="bfloat16"))
        state = build.new_state(parts, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params), 0)
        grads = jax.tree.map(lambda x, dtype=dtype: (x + 0.5).astype(jnp.bfloat16).astype(dtype), params)
        take = jax.jit(
            lambda state, parts=parts, grads=grads: apply_gradient(parts, state, jnp.float32(0.0), grads).state
        )
        for _ in range(3):
            state = take(state)
        ends.append(state)
    narrow, wide = ends
    jax.tree.map(np.testing.assert_array_equal, narrow.opt_state, Masters(wide.params, wide.opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), narrow.params, wide.params)
