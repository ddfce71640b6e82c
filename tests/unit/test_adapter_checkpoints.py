"""Where adapters learn, a step's checkpoint holds those alone, and the base lies beside the steps, once."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl_reason import bases, build, evaluate, sharding
from rl_reason.checkpoint import CheckpointError, Checkpoints, host_copy
from rl_reason.drivers.supervised import Supervised
from rl_reason.loop.partition import join, split
from rl_reason.models import hf_export
from tests.support import load_config, one_device
from tests.unit.test_hf_weights import assert_same, params_of, tiny


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
    bases.keep(tmp_path / "checkpoints", params, {"": ""})
    checkpoints.save(3, (driver.kept(state), driver.pending), {})

    shapes = build.placed_shapes(experiment.parts.model, None, experiment.mesh)
    read = lambda: bases.read(tmp_path / "checkpoints", "", experiment.parts.model, shapes)
    other = driver.initial_state(read())
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
        read()
    with pytest.raises(CheckpointError, match=r"checkpoints/base is missing"):
        evaluate.restore_policy(tmp_path / "checkpoints", evaluate.setup_of(experiment.config, one_device()))
    checkpoints.close()


def test_without_adapters_a_checkpoint_is_whole():
    driver = Supervised(experiment := experiment_of(0))
    state = driver.initial_state(build.init_params(experiment))
    assert driver.kept(state) is state and driver.around_base(state, state) is state


def test_a_base_that_is_a_checkpoint_is_kept_by_name(tmp_path):
    model = tiny("qwen3")
    params, kept, weights = params_of(model), tmp_path / "checkpoints", tmp_path / "weights"
    hf_export.write(weights, params, model, dtype="float32")
    kept.mkdir()
    bases.keep(kept, params, {"": str(weights)})
    assert [path.name for path in kept.iterdir()] == ["base.json"]
    mesh = sharding.make_mesh({}, one_device())
    read = lambda policy="": bases.read(kept, policy, model, build.placed_shapes(model, None, mesh))
    assert_same(read(), params)

    moved = weights.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"weights is gone, .* write into .*base\.json where it is now"):
        read()
    note = kept / "base.json"
    note.write_text(note.read_text().replace(str(weights), str(moved)))
    assert_same(read(), params)
    hf_export.write(weights, jax.tree.map(lambda x: x + 1, params), model, dtype="float32")
    note.write_text(note.read_text().replace(str(moved), str(weights)))
    with pytest.raises(CheckpointError, match=r"weights has other tensors than when this run began"):
        read()


def test_of_a_cohort_each_policy_has_its_own_or_all_are_saved(tmp_path):
    models = {"wide": tiny("qwen3"), "deep": tiny("qwen3", num_layers=5)}
    params = {name: params_of(model) for name, model in models.items()}
    mesh = sharding.make_mesh({}, one_device())
    for name, model in models.items():
        hf_export.write(tmp_path / name, params[name], model, dtype="float32")
    for number, folders in enumerate(({name: str(tmp_path / name) for name in models}, dict(wide="", deep="deep"))):
        kept = tmp_path / f"kept{number}"
        kept.mkdir()
        bases.keep(kept, params, folders)
        assert (kept / "base.json").exists() == (number == 0) and (kept / "base").exists() == (number == 1)
        for name, model in models.items():
            assert_same(bases.read(kept, name, model, build.placed_shapes(model, None, mesh)), params[name])
