"""Checkpoints of every family, written and read again: bit by bit, over devices, and what is wrong with a folder."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from configs.models import MODELS
from rl_reason import sharding
from rl_reason.models import hf_export, hf_names, hf_weights
from rl_reason.models.hf_config import WeightsError, model_keys, read_json
from rl_reason.models.hf_files import Checkpoint
from rl_reason.models.transformer import ModelConfig, param_shapes

SIZES = dict(
    vocab_size=32, num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=24, max_position=64
)
FAMILIES = {
    "llama": "Llama-3.1-8B",
    "mixtral": "Mixtral-8x7B-v0.1",
    "qwen2": "Qwen2.5-7B",
    "qwen3": "Qwen3-0.6B",
    "qwen3_moe": "Qwen3-30B-A3B-Base",
    "gemma2": "gemma-2-9b",
    "gemma3": "gemma-3-4b-pt",
    "glm": "glm-4-9b-chat-hf",
    "glm4": "glm-4-9b-chat-hf",
}
REST = dict(dtype="float32", param_dtype="float32", scan_layers=False, scan_decode=False, remat="none")


def tiny(family: str, **changes) -> ModelConfig:
    """A published model's function in sizes that all differ where they can."""
    keys = MODELS[FAMILIES[family]] | SIZES | REST
    if keys["num_experts"]:
        keys |= dict(num_experts=4, experts_per_token=2)
    if keys["full_every"]:
        keys |= dict(full_every=2)  # of three layers
    if keys["rotary_dim"]:
        keys |= dict(rotary_dim=4, post_norms=family == "glm4")
    return ModelConfig.of(keys | changes)


@functools.cache
def params_of(model: ModelConfig):
    """Random ones, made once."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), param_shapes(model))


def assert_same(a, b):
    """The same tree, bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """A checkpoint of four files."""
    path, model = tmp_path_factory.mktemp("whole") / "model", tiny("qwen3")
    hf_export.write(path, params_of(model), model, dtype="float32", max_shard_bytes=12_000)
    return path


@pytest.fixture
def folder(whole_folder, tmp_path):
    """A copy of it for a test to spoil."""
    return shutil.copytree(whole_folder, tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read_again(family, tmp_path):
    model = tiny(family)
    params = params_of(model)
    done = []
    export = hf_export.write(
        tmp_path / "out",
        params,
        model,
        dtype="float32",
        max_shard_bytes=12_000,
        on_tensor=lambda *count: done.append(count),
    )
    assert done == [(i + 1, len(export.sizes)) for i in range(len(export.sizes))]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 12_000 + 4_000 for file in files)  # and a header
    assert ModelConfig.of(model_keys(read_json(tmp_path / "out" / "config.json")) | REST) == model
    assert_same(hf_weights.read(tmp_path / "out", model).params, params)
    assert not list(tmp_path.glob(".*"))


def test_tensors_are_torchs():
    # Ours [D H h] is their [H h, D]: row 1 * h + 2 of a query's weight is head 1, channel 2.
    tensor = hf_names.LAYER["attention/q/kernel"]
    ours = np.arange(3 * 2 * 4).reshape(3, 2, 4)
    theirs = tensor.to_theirs(ours)
    assert theirs.shape == (8, 3)
    np.testing.assert_array_equal(theirs[1 * 4 + 2], ours[:, 1, 2])
    np.testing.assert_array_equal(tensor.to_ours(theirs, ours.shape), ours)
    out = hf_names.LAYER["attention/out/kernel"]  # [H h D] is [D, H h]
    np.testing.assert_array_equal(out.to_theirs(ours)[3, 1 * 2 + 0], ours[1, 0, 3])


def test_pairs_side_by_side():
    # GLM turns channels (0, 1) and (2, 3) of the first four; ours are (0, 2) and (1, 3), and 4 and 5 stay where they are.
    for path, x in (
        ("attention/q/kernel", np.random.default_rng(0).normal(size=(3, 2, 6)).astype(np.float32)),
        ("attention/k/bias", np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)),
    ):
        tensor = hf_names.of_layer(tiny("glm"))[path]
        theirs = tensor.to_theirs(x)
        for head in range(2):
            for ours, their in enumerate([0, 2, 1, 3, 4, 5]):
                np.testing.assert_array_equal(theirs[head * 6 + their], x[..., head, ours])
        np.testing.assert_array_equal(tensor.to_ours(theirs, x.shape), x)
        np.testing.assert_array_equal(tensor.to_theirs(tensor.to_ours(theirs, x.shape)), theirs)
    same = hf_names.of_layer(tiny("glm"))
    assert all(same[f"attention/{name}"].turned == 0 for name in ("v/kernel", "v/bias", "out/kernel"))


def test_glms_tensors(tmp_path):
    model = tiny("glm4")
    params = params_of(model)
    hf_export.write(tmp_path / "out", params, model, dtype="float32")
    tensors = load_file(tmp_path / "out/model.safetensors")
    layer = {name.removeprefix("model.layers.1."): x for name, x in tensors.items() if ".layers.1." in name}
    norms = ("input", "post_self_attn", "post_attention", "post_mlp")
    assert set(layer) == {
        *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
        *("self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
        *(f"{name}_layernorm.weight" for name in norms),
    }
    mlp = params["layers"]["mlp"]
    both = np.concatenate([mlp["gate"]["kernel"][1].T, mlp["up"]["kernel"][1].T])
    np.testing.assert_array_equal(layer["mlp.gate_up_proj.weight"], both)
    for name, ours in zip(norms, ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"), strict=True):
        np.testing.assert_array_equal(layer[f"{name}_layernorm.weight"], params["layers"][ours]["scale"][1])


def test_scaled_embeddings_of_a_glm4_go_into_its_table(tmp_path):
    model = tiny("glm4", scale_embeddings=True)
    hf_export.write(tmp_path / "out", params_of(model), model, dtype="float32")
    theirs = hf_weights.read(tmp_path / "out", tiny("glm4")).params
    np.testing.assert_array_equal(theirs["embed"], 4 * params_of(model)["embed"])


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "glm"])
def test_read_over_four_devices(family, tmp_path):
    model = tiny(family)
    params = params_of(model)
    hf_export.write(tmp_path / "out", params, model, dtype="float32")
    expert = 2 if model.num_experts else 1
    mesh = sharding.make_mesh(dict(fsdp=2, tensor=2 // expert, expert=expert))
    shardings = sharding.param_shardings(params, mesh)
    got = hf_weights.read(tmp_path / "out", model, shardings).params
    assert_same(got, params)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings
    kernel = got["layers"]["moe"]["up"] if model.num_experts else got["layers"]["attention"]["q"]["kernel"]
    assert isinstance(kernel.sharding, NamedSharding) and kernel.addressable_shards[0].data.size == kernel.size // 4
    hf_export.write(tmp_path / "again", got, model, dtype="float32")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_dtypes_are_converted_on_the_way(tmp_path):
    model = tiny("qwen3")
    params = params_of(model)
    hf_export.write(tmp_path / "out", params, model, dtype="bfloat16")
    assert read_json(tmp_path / "out/config.json")["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same(hf_weights.read(tmp_path / "out", tiny("qwen3", param_dtype="bfloat16")).params, rounded)
    assert_same(hf_weights.read(tmp_path / "out", model).params, jax.tree.map(lambda x: x.astype("float32"), rounded))


def test_our_own_default_becomes_a_qwen3(tmp_path):
    # Scaled tied embeddings: sqrt(16) = 4 goes into the table, exactly, and the head stays as it was.
    model = tiny("qwen3", scale_embeddings=True)
    params = params_of(model)
    hf_export.write(tmp_path / "out", params, model, dtype="float32")
    config = read_json(tmp_path / "out/config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"] and not config["tie_word_embeddings"]
    theirs = hf_weights.read(tmp_path / "out", tiny("qwen3", tie_embeddings=False)).params
    np.testing.assert_array_equal(theirs["embed"], 4 * params["embed"])
    np.testing.assert_array_equal(theirs["unembed"], params["embed"].T)


def test_fused_experts(tmp_path, folder):
    model = tiny("qwen3_moe")
    params = params_of(model)
    hf_export.write(tmp_path / "apart", params, model, dtype="float32")
    tensors = load_file(tmp_path / "apart/model.safetensors")
    for i in range(model.num_layers):
        of = lambda e, name, i=i: tensors.pop(f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight")
        both = [np.concatenate([of(e, "gate"), of(e, "up")]) for e in range(4)]
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.stack(both)
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack([of(e, "down") for e in range(4)])
    save_file(tensors, tmp_path / "apart/model.safetensors")
    assert_same(hf_weights.read(tmp_path / "apart", model).params, params)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_towers_are_left_in_place(prefix, tmp_path):
    model = tiny("qwen3", tie_embeddings=False)
    params = params_of(model)
    hf_export.write(tmp_path / "alone", params, model, dtype="float32")
    config, tensors = read_json(tmp_path / "alone/config.json"), load_file(tmp_path / "alone/model.safetensors")
    head = hf_names.HEADS.get(prefix, "lm_head.weight")
    named = {head if name == "lm_head.weight" else prefix + name[len("model.") :]: x for name, x in tensors.items()}
    towers = {"model.vision_tower.norm.bias": np.arange(3, dtype=np.float16), "mlp1.weight": np.ones((2, 2), np.int8)}
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(named | towers, whole / "model.safetensors")
    outer = dict(architectures=["InternS1ForConditionalGeneration"], model_type="interns1", text_config=config)
    (whole / "config.json").write_text(json.dumps(outer))
    (whole / "tokenizer.json").write_text("{}")
    (whole / "README.md").write_text("about the weights as they were")
    read = hf_weights.read(whole, model)
    assert_same(read.params, params)
    assert read.towers == sorted(towers)

    changed = jax.tree.map(lambda x: 2 * x, params)
    hf_export.write(tmp_path / "out", changed, model, dtype="bfloat16", like=whole)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json"),
    ]
    written = Checkpoint(tmp_path / "out")
    assert written.names == sorted(named | towers)
    for name, tower in towers.items():
        np.testing.assert_array_equal(written.read(name), tower, strict=True)
    config = read_json(tmp_path / "out/config.json")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    want = jax.tree.map(lambda x: (2 * x).astype(ml_dtypes.bfloat16).astype("float32"), params)
    assert_same(hf_weights.read(tmp_path / "out", model).params, want)


def test_what_nobody_uses_is_told(folder):
    name = sorted(path.name for path in folder.glob("*.safetensors"))[-1]
    tensors = load_file(folder / name)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4), "lm_head.weight": np.ones((32, 16))}
    save_file(tensors | extra, folder / name)
    assert hf_weights.read(folder, tiny("qwen3")).unused == sorted(extra)


def spoil_index(folder):
    index = read_json(folder / "model.safetensors.index.json")
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00009-of-00009.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def promise(folder):
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["model.layers.7.input_layernorm.weight"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(folder, name, make):
    """Replaces, or with None drops, one tensor."""
    index = read_json(folder / "model.safetensors.index.json")
    file = folder / index["weight_map"].get(name, "model-00001-of-00004.safetensors")
    tensors = load_file(file)
    made = make(tensors.pop(name, None))
    index["weight_map"].pop(name, None)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors | ({} if made is None else {name: made}), file)


def cut(folder, count):
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:count])


UP = "model.layers.1.mlp.up_proj.weight"
SPOILS = {
    "a missing file": (
        lambda folder: (folder / "model-00002-of-00004.safetensors").unlink(),
        "model.safetensors.index.json names model-00002-of-00004.safetensors, and",
    ),
    "an index of other files": (spoil_index, "names model-00009-of-00009.safetensors, and"),
    "an index of other tensors": (
        promise,
        "promises model.layers.7.input_layernorm.weight, and model-00001-of-00004.safetensors has no such tensor",
    ),
    "a damaged index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        "model.safetensors.index.json cannot be read",
    ),
    "a file cut short": (
        lambda folder: cut(folder, 2000),
        "model-00002-of-00004.safetensors is no whole safetensors file",
    ),
    "an empty file": (lambda folder: cut(folder, 0), "it has 0 bytes: fetch it again"),
    "a damaged header": (
        lambda folder: (folder / "model-00002-of-00004.safetensors").write_bytes(b"\x08" + bytes(7) + b"notjson!" * 9),
        "model-00002-of-00004.safetensors is no whole safetensors file",
    ),
    "no safetensors": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "has neither model.safetensors nor model.safetensors.index.json; fetch the checkpoint's safetensors",
    ),
    "torch's own format": (
        lambda folder: [path.unlink() for path in folder.glob("model*")] + [(folder / "pytorch_model.bin").touch()],
        "pytorch_model.bin has torch's own format: load the model in transformers and save_pretrained it",
    ),
    "a tensor too few": (lambda folder: change(folder, UP, lambda x: None), f"lacks {UP} of the 35 tensors"),
    "a tensor too many": (
        lambda folder: change(folder, "model.layers.0.self_attn.q_proj.bias", lambda _: np.zeros(32, np.float32)),
        "model-00001-of-00004.safetensors has model.layers.0.self_attn.q_proj.bias, of which the model that",
    ),
    "a tensor of another shape": (
        lambda folder: change(folder, UP, lambda x: x.T),
        f"{UP} is [16, 24], and config.json makes it [24, 16]",
    ),
    "a quantised tensor": (
        lambda folder: change(folder, UP, lambda x: x.astype(np.int8)),
        f"{UP} is I8; there are F64",
    ),
    "no embeddings": (
        lambda folder: change(folder, "model.embed_tokens.weight", lambda x: None),
        "has no embed_tokens.weight below any of model.language_model., language_model.model., model.; its first",
    ),
}


@pytest.mark.parametrize("spoil, says", SPOILS.values(), ids=SPOILS)
def test_a_folder_that_is_not_whole(spoil, says, folder):
    spoil(folder)
    with pytest.raises(WeightsError, match=re.escape(says)) as error:
        hf_weights.read(folder, tiny("qwen3"))
    assert str(folder) in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(WeightsError, match="there is no such folder"):
        hf_weights.read(tmp_path / "nowhere", tiny("qwen3"))


def test_exports_that_are_refused(tmp_path, folder):
    model = tiny("qwen3")
    params = params_of(model)
    with pytest.raises(WeightsError, match=r"model is there already; name another folder, or delete it"):
        hf_export.write(folder, params, model, dtype="float32")
    taller = tiny("qwen3", num_layers=2)
    with pytest.raises(WeightsError, match=r"lacks|num_layers=2 \(there 3\)|of which the model"):
        hf_export.write(tmp_path / "out", params_of(taller), taller, dtype="float32", like=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


KILLED = """
import os, signal, sys
from rl_reason.models import hf_export
from tests.unit.test_hf_weights import params_of, tiny
model = tiny("qwen3")
stop = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 20 else None
hf_export.write(sys.argv[1], params_of(model), model, dtype="float32", max_shard_bytes=12_000, on_tensor=stop)
"""


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".tmp") and list(left.glob("*.safetensors"))
    with pytest.raises(WeightsError, match=r"config.json: no such file.*an interrupted export left has no such file"):
        read_json(left / "config.json")


def test_an_export_that_fails_leaves_nothing(tmp_path):
    model = tiny("qwen3")

    def fail(done, total):
        raise RuntimeError(done, total)

    with pytest.raises(RuntimeError):
        hf_export.write(tmp_path / "out", params_of(model), model, dtype="float32", on_tensor=fail)
    assert not list(tmp_path.iterdir())
