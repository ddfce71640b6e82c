"""Where adapters learn, a step's checkpoint holds those alone, and the base lies beside the steps, once."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl_reason import build, evaluate
from rl_reason.checkpoint import CheckpointError, Checkpoints, host_copy
from rl_reason.drivers.supervised import Supervised
from rl_reason.loop.partition import join, split
from tests.support import load_config, one_device


def experiment_of(rank):
    config = load_config("sft")
    config.lora.rank = rank
    return build.build(config, one_device())


def test_a_state_comes_back_around_its_base(tmp_path):
    experiment = experiment_of(2)
    driver, params = Supervised(experiment), build.init_params(experiment)
    state = driver.initial_state(params)
    learned, fixed = split(state.params, experiment.parts.frozen)
    state = dataclasses.replace(state, params=join(jax.tree.map(lambda x: x + 1, learned), fixed))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save_base(params)
    checkpoints.save(3, (driver.kept(state), driver.pending), {})

    other = driver.initial_state(checkpoints.restore_base(jax.tree.map(jnp.zeros_like, params)))
    kept, _ = checkpoints.restore(3, (driver.kept(other), driver.pending))
    jax.tree.map(np.testing.assert_array_equal, host_copy(driver.around_base(kept, other)), host_copy(state))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(tmp_path / "checkpoints" / "step_3" / "state").item_metadata.tree
    assert not [name for name in names if "kernel" in name or "embed" in name]
    assert len([name for name in names if "lora_" in name]) == 7 * (3 + 4)  # A, B, scale; two moments of A and of B

    step, found = evaluate.restore_policy(tmp_path / "checkpoints", evaluate.setup_of(experiment.config, one_device()))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, state.params)
    shutil.rmtree(tmp_path / "checkpoints" / "base")
    with pytest.raises(CheckpointError, match=r"checkpoints/base is missing: adapters mean nothing without it"):
        checkpoints.restore_base(params)
    with pytest.raises(CheckpointError, match=r"checkpoints/base is missing"):
        evaluate.restore_policy(tmp_path / "checkpoints", evaluate.setup_of(experiment.config, one_device()))
    checkpoints.close()


def test_without_adapters_a_checkpoint_is_whole():
    driver = Supervised(experiment := experiment_of(0))
    state = driver.initial_state(build.init_params(experiment))
    assert driver.kept(state) is state and driver.around_base(state, state) is state
