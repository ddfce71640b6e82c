"""Adapters as PEFT has them: what they add to a tensor of the base is what merging adds."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rl_reason.models import hf_names, lora, peft
from rl_reason.models.lora import Lora
from rl_reason.sharding import by_path, path_name
from tests.support import tiny_model, tiny_params


def test_scaled_products_are_what_merging_adds(tmp_path):
    targets = ("attention/(q|out)", "mlp/down")
    params = lora.add(jax.random.key(0), tiny_params(tiny_model()), Lora(3, 12.0, targets, merge_to_sample=True))
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + rng.normal(size=x.shape) if path_name(path).endswith("lora_b") else x, params
    )
    peft.write(tmp_path / "adapters", params, base="some/checkpoint")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12.0, "some/checkpoint")
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"]

    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    change = jax.tree.map(lambda a, b: np.asarray(a - b), lora.merged(params), lora.base(params))
    change = by_path(change["layers"])
    for path in ("attention/q/kernel", "attention/out/kernel", "mlp/down/kernel"):
        tensor = hf_names.LAYER[path]
        for i in range(2):
            name = f"base_model.model.model.layers.{i}.{tensor.name.removesuffix('.weight')}"
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            np.testing.assert_allclose(12.0 / 3 * b @ a, tensor.to_theirs(change[path][i]), atol=1e-5)


def test_without_adapters_there_is_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no adapters among these parameters"):
        peft.write(tmp_path / "adapters", tiny_params(tiny_model()), base="")
