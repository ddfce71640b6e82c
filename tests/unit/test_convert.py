"""From a run to a checkpoint, and from one checkpoint to another; and runs that start from them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from experiments import config_files, convert
from rl_reason import bases, build, warmup
from rl_reason.checkpoint import Checkpoints
from rl_reason.data.sentencepiece_tokenizer import EMBEDDED, SentencePieceTokenizer
from rl_reason.drivers.supervised import Supervised
from rl_reason.models import hf_config, hf_export, hf_weights
from rl_reason.models.hf_config import WeightsError
from rl_reason.models.transformer import ModelConfig
from rl_reason.report.rundir import open_run
from rl_reason.types import TrainState
from tests.support import load_config, one_device
from tests.unit.test_hf_weights import assert_same, params_of, tiny

# The command line imports modules whose hints beartype would have spelled otherwise.
pytestmark = pytest.mark.filterwarnings("ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
HOW = dict(param_dtype="float32") | convert.HOW
EMBEDDED_TOKENIZER = SentencePieceTokenizer.load()
VOCAB = EMBEDDED_TOKENIZER.vocab_size


def read(folder, **how):
    """A checkpoint by its own config.json."""
    model = ModelConfig.of(hf_config.model_keys(hf_config.read_json(folder / "config.json")) | HOW | how)
    return model, hf_weights.read(folder, model).params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, parameters) of a run of the default's shapes that was saved at step 2."""
    path = tmp_path_factory.mktemp("runs") / "one"
    config = load_config("base")
    open_run(config.to_dict(), config_name="base", run=str(path))
    params = params_of(build.model_config(config, EMBEDDED_TOKENIZER))
    checkpoints = Checkpoints(path / "checkpoints", keep=1)
    state = TrainState(step=jnp.int32(2), params=params, opt_state=None, key=jax.random.key(0))
    checkpoints.save(2, (state, None), dict(step=2))
    checkpoints.close()
    return path, params


@pytest.fixture(scope="module")
def experiment(checkpoint):
    """One that starts from the checkpoint."""
    return build.build(settled(checkpoint), one_device())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen3 with as many embeddings as the embedded tokenizer has ids, and its model beside it."""
    path, model = tmp_path_factory.mktemp("hf") / "model", tiny("qwen3", vocab_size=VOCAB)
    hf_export.write(path, params_of(model), model, dtype="float32", files={"tokenizer.model": EMBEDDED})
    return path


def test_a_run_becomes_a_checkpoint(run, tmp_path, capsys):
    path, params = run
    assert convert.main([f"--from={path}", f"--to={tmp_path / 'out'}"]) == 0
    assert "Qwen3ForCausalLM, 25 tensors in float32" in capsys.readouterr().out
    model, got = read(tmp_path / "out")
    assert not model.tie_embeddings and model.max_position == 18 + 24
    np.testing.assert_array_equal(got["embed"], params["embed"] * np.float32(32**0.5))
    np.testing.assert_array_equal(got["unembed"], params["embed"].T)
    assert_same(got["layers"], params["layers"])
    assert (tmp_path / "out/tokenizer.model").read_bytes() == EMBEDDED.read_bytes()
    ids = EMBEDDED_TOKENIZER
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["eos_token_id"] == ids.eos_id and written["pad_token_id"] == ids.pad_id


def test_from_one_checkpoint_to_another(checkpoint, tmp_path, capsys):
    args = [f"--from={checkpoint}", f"--to={tmp_path / 'half'}", "--dtype=bfloat16"]
    assert convert.main(args) == 0
    assert "[write] done 35/35" in capsys.readouterr().out
    _, params = read(checkpoint)
    half = read(tmp_path / "half", param_dtype="bfloat16")[1]
    assert_same(half, jax.tree.map(lambda x: x.astype("bfloat16"), params))
    assert (tmp_path / "half/tokenizer.model").exists()
    assert convert.main(args) == 1
    assert "half is there already; name another folder" in capsys.readouterr().err


def test_there_and_back_through_orbax(checkpoint, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert.main([f"--from={checkpoint}", f"--to={there}", "--as=orbax"]) == 0
    assert not list(there.glob("*.safetensors")) and (there / "tokenizer.model").exists()
    model, params = read(there)
    assert_same(params, read(checkpoint)[1])
    rounded = read(there, param_dtype="bfloat16")[1]
    assert_same(rounded, jax.tree.map(lambda x: x.astype("bfloat16"), params))
    assert convert.main([f"--from={there}", f"--to={back}"]) == 0
    assert (back / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=r"is of another model than this one, which has num_layers=2 \(there 3\)"):
        hf_weights.read(there, tiny("qwen3", vocab_size=VOCAB, num_layers=2))
    (there / "params/manifest.ocdbt").unlink()
    with pytest.raises(WeightsError, match=r"there/params cannot be read .*; convert it again"):
        hf_weights.read(there, model)


def test_adapters_alone_or_merged(tmp_path, capsys):
    config = load_config("sft")
    config.lora.rank = 2
    driver = Supervised(experiment := build.build(config, one_device()))
    params = build.init_params(experiment)
    state = driver.initial_state(params)
    open_run(config.to_dict(), config_name="sft", run=str(tmp_path / "run"))
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=1)
    bases.keep(tmp_path / "run/checkpoints", params, {"": ""})
    checkpoints.save(2, (driver.kept(state), driver.pending), dict(step=2))
    checkpoints.close()
    assert convert.main([f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'alone'}", "--as=adapters"]) == 0
    assert f"adapters of {tmp_path / 'run'}" in capsys.readouterr().out
    with safe_open(tmp_path / "alone/adapter_model.safetensors", "numpy") as file:
        assert len(file.keys()) == 2 * 2 * 7  # A and B of two layers
    assert convert.main([f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'merged'}"]) == 0
    assert_same(read(tmp_path / "merged")[1]["layers"], params["layers"])  # B is 0 at first


@pytest.mark.parametrize(
    "args, says",
    [
        (["--from={tmp}/nothing"], "nothing/config.json: no such file"),
        (["--from={run}", "--step=3"], "holds no step 3; it has 2"),
        (["--from={run}", "--policy=small"], "--policy=small: the run has none of that name"),
        (["--from={hf}", "--step=3"], "--step and --policy are of runs"),
        (["--from={run}", "--as=adapters"], "There are no adapters among these parameters"),
        (["--from={run}", "--like={hf}"], "is of another model than this one, which has num_layers=2 (there 3)"),
    ],
)
def test_what_cannot_be_converted(args, says, run, checkpoint, tmp_path, capsys):
    args = [arg.format(tmp=tmp_path, run=run[0], hf=checkpoint) for arg in args]
    assert convert.main([*args, f"--to={tmp_path / 'out'}"]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def settled(folder, **asked):
    """base.py:smoke as the command line makes it with --config.weights, and what else is asked for."""
    config = load_config("base")
    config.weights = str(folder)
    asked = {key.replace("__", "."): value for key, value in asked.items()}
    config.update_from_flattened_dict(asked)
    return config_files.settled(config, asked)


def test_weights_settle_the_model(checkpoint):
    config = settled(checkpoint)
    model = tiny("qwen3", vocab_size=VOCAB)
    assert build.model_config(config, EMBEDDED_TOKENIZER) == model
    assert build.load_tokenizer(config) == EMBEDDED_TOKENIZER and config.warmup.num_steps == 0
    asked = settled(checkpoint, warmup__num_steps=6, model__num_layers=3, model__remat="full")
    assert (asked.warmup.num_steps, asked.model.remat) == (6, "full")
    with pytest.raises(WeightsError, match=r"--config.model.num_layers=2: config.weights='.*' has 3; leave it out"):
        settled(checkpoint, model__num_layers=2)
    with pytest.raises(WeightsError, match=r"config.weights='nowhere': nowhere/config.json: no such file"):
        settled("nowhere")


def test_other_models_of_a_preference_run_have_their_own(checkpoint, tmp_path):
    config = load_config("air")
    entry = dict(name="read", seed_offset=1, model={}, warmup=dict(num_steps=0), weights=str(checkpoint))
    trained = dict(name="made", seed_offset=2, model=dict(num_layers=1), warmup=dict(num_steps=2))
    config.preference.models = (entry, trained)
    experiment = build.build(config_files.settled(config, {}), one_device())
    read, made = experiment.others["read"], experiment.others["made"]
    assert read.parts.model == tiny("qwen3", vocab_size=VOCAB) and experiment.parts.model.num_layers != 3
    assert made.config.weights == "" and made.parts.model.num_layers == 1
    assert_same(warmup.initial(read).params, params_of(read.parts.model))

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "tokenizer.model").unlink()
    config.preference.models = (entry | dict(weights=str(other)),)
    with pytest.raises(ValueError, match=r"config.preference.models: 'read' begins with '.*other': .*tokenizer"):
        build.build(config, one_device())
    config.preference.models = (entry | dict(weights="nowhere"),)
    with pytest.raises(
        WeightsError, match=r"config.preference.models\[0\].weights='nowhere': nowhere/config.json: no such"
    ):
        config_files.settled(config, {})


def test_policies_of_a_cohort_have_their_own(checkpoint):
    config = load_config("rlccf")
    name = next(iter(config.cohort))
    with config.unlocked():
        config.cohort[name].weights = str(checkpoint)
    config = config_files.settled(config, {})
    assert config.cohort[name].model.num_layers == 3 and config.model.num_layers == 2
    config.cohort[name].weights = "nowhere"
    with pytest.raises(WeightsError, match=f"config.cohort.{name}.weights='nowhere'"):
        config_files.settled(config, {})


def test_a_run_starts_from_weights(experiment):
    counted = []
    loaded = warmup.initial(experiment, lambda *count: counted.append(count))
    assert_same(loaded.params, params_of(experiment.parts.model))
    assert counted[-1] == (35, 35)
    warm = warmup.warm_up(experiment, loaded.params, lambda step, metrics: None)
    assert warm.params is loaded.params and not warm.cached


def test_warm_ups_of_other_weights_are_others(experiment, checkpoint, tmp_path):
    name = warmup.fingerprint(experiment)
    assert name == warmup.fingerprint(experiment)
    config = experiment.config.copy_and_resolve_references()
    config.weights = str(tmp_path / "other")
    shutil.copytree(checkpoint, config.weights)
    (tmp_path / "other/model.safetensors").touch()
    assert warmup.fingerprint(dataclasses.replace(experiment, config=config)) != name


def test_a_vocabulary_smaller_than_the_tokenizers(checkpoint, tmp_path):
    model = tiny("qwen3")
    hf_export.write(tmp_path / "small", params_of(model), model, dtype="float32", files={"tokenizer.model": EMBEDDED})
    with pytest.raises(
        ValueError, match=f"config.model.vocab_size=32 is less than the {VOCAB} ids of config.tokenizer"
    ):
        build.model_config(settled(tmp_path / "small"), EMBEDDED_TOKENIZER)
