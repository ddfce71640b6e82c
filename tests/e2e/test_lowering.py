"""A whole step, lowered for chips that are not here."""

import jax
import jax.numpy as jnp
import pytest

from kernels import dispatch
from rl_reason import build
from rl_reason.loop.chunk import make_chunk
from rl_reason.models import transformer
from rl_reason.sampling import make_sampling
from tests import support

WIDTH = 16  # of prompts and of completions: the kernel wants caches of a multiple of 8 positions
SHAPES = dict(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=64, mlp_size=64, dtype="bfloat16")


def calls(model) -> int:
    """Kernels in a step of rollout and update, lowered for CUDA."""
    parts = support.tiny_parts(model=SHAPES | model, rollout=dict(completion_len=WIDTH))
    shapes = transformer.param_shapes(parts.model)

    def run(prompts):
        state = build.new_state(parts, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), 0)
        return make_chunk(parts, support.parity_verify)(state, prompts, make_sampling(1.0, 0, 1.0, 0.0))

    jax.clear_caches()  # who is asked for devices is not part of a trace's key
    prompts = jax.tree.map(lambda x: x[None], support.tiny_prompts(4, width=WIDTH))
    text = jax.jit(run).trace(prompts).lower(lowering_platforms=("cuda",)).as_text()
    return support.kernel_calls(text, "mosaic_gpu_v2")


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_for_hopper_has_the_kernels_in_it(scan, monkeypatch):
    """In bf16, of shapes that kernels take: attention of a dense model, and a mixture's products besides."""
    layers = dict(scan_layers=scan, scan_decode=scan)
    assert calls(layers) == 0  # nothing says that it is for Hopper
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    attention = calls(layers)
    assert 0 < attention < calls(layers | support.MOE)
