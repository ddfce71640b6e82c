"""Eight devices, three axes of two at a time until all four have met: same tokens, same weights as on one."""

import os
import subprocess
import sys
import typing

import jax
import numpy as np
import pytest

from rl_reason import sharding
from tests import support
from tests.e2e import loops
from tests.e2e.test_sharding import parts_on, train

PLAN: dict[str, typing.Any] = dict(
    prompts_per_step=16, generated_prompts=16, rollout=dict(num_slots=8)
)  # for 8 row shards
MESHES = ["2,2,2,1", "1,2,2,2", "2,1,2,2", "2,2,1,2"]  # data, fsdp, tensor, expert


def compare(sizes: str, moe: bool) -> None:
    """One RL step in float64 on the mesh and on one device, in a process of eight."""
    with jax.enable_x64(True):
        mesh = loops.mesh_of(jax.devices(), **dict(zip(sharding.AXES, map(int, sizes.split(",")), strict=True)))
        out, expected = (
            train(over, parts_on(over, moe=moe, **PLAN), support.parity_verify, steps=1)
            for over in (mesh, loops.mesh_of())
        )
        start = loops.start(parts_on(mesh, moe=moe, **PLAN))
    np.testing.assert_array_equal(out.sampled.tokens, expected.sampled.tokens)
    assert loops.distance(out.state.params, expected.state.params) < 1e-10
    assert loops.distance(expected.state.params, start.params) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), [("dense", MESHES[0]), *(("moe", sizes) for sizes in MESHES)])
def test_eight_devices_train_as_one_does(kind, sizes):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "10"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, sizes, kind], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2] == "moe")
