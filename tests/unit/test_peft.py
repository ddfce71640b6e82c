"""Adapters as PEFT has them: what they add to a tensor of the base is what merging adds."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rl_reason.models import hf_names, lora, peft
from rl_reason.models.lora import Lora
from rl_reason.sharding import by_path, path_name
from tests.support import GLM, tiny_model, tiny_params


def adapted(model, targets):
    """Parameters with adapters of rank 3 that add something."""
    params = lora.add(jax.random.key(0), tiny_params(model), Lora(3, 12.0, targets, merge_to_sample=True))
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + rng.normal(size=x.shape) if path_name(path).endswith("lora_b") else x, params
    )


def written(folder, params, model):
    """(adapter_config.json, tensors) that are written."""
    peft.write(folder / "adapters", params, model, base="some/checkpoint")
    config = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    return config, load_file(folder / "adapters" / "adapter_model.safetensors")


def changes(params):
    """What merging adds to each kernel, by path."""
    change = jax.tree.map(lambda a, b: np.asarray(a - b), lora.merged(params), lora.base(params))
    return by_path(change["layers"])


def of(tensors, layer, name):
    name = f"base_model.model.model.layers.{layer}.{name.removesuffix('.weight')}"
    return tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]


def test_scaled_products_are_what_merging_adds(tmp_path):
    params = adapted(tiny_model(), ("attention/(q|out)", "mlp/down"))
    config, tensors = written(tmp_path, params, tiny_model())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12.0, "some/checkpoint")
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"] and "rank_pattern" not in config
    assert len(tensors) == 2 * 2 * 3
    for path in ("attention/q/kernel", "attention/out/kernel", "mlp/down/kernel"):
        tensor = hf_names.LAYER[path]
        for i in range(2):
            a, b = of(tensors, i, tensor.name)
            np.testing.assert_allclose(12.0 / 3 * b @ a, tensor.to_theirs(changes(params)[path][i]), atol=1e-5)


@pytest.mark.parametrize("targets, rank", [(("attention", "mlp"), 6), (("attention/k", "mlp/up"), 3)])
def test_glms_order_and_its_fused_feed_forward(targets, rank, tmp_path):
    model = tiny_model(**GLM)
    params = adapted(model, targets)
    config, tensors = written(tmp_path, params, model)
    change, named = changes(params), hf_names.of_layer(model)
    for i in range(2):
        for path in ("attention/q/kernel", "attention/k/kernel", "attention/v/kernel", "attention/out/kernel"):
            if f"{path.removesuffix('kernel')}lora_a" not in by_path(params["layers"]):
                continue
            a, b = of(tensors, i, named[path].name)
            np.testing.assert_allclose(12.0 / 3 * b @ a, named[path].to_theirs(change[path][i]), atol=1e-5)
        a, b = of(tensors, i, "mlp.gate_up_proj")
        assert a.shape[0] == b.shape[1] == rank
        gate, up = (change[path][i].T for path in ("mlp/gate/kernel", "mlp/up/kernel"))
        np.testing.assert_allclose(12.0 / 3 * b @ a, np.concatenate([gate, up]), atol=1e-5)
    # alpha / r is 4 for each module.
    both = rank == 6
    assert config.get("rank_pattern") == (dict(gate_up_proj=6) if both else None)
    assert config.get("alpha_pattern") == (dict(gate_up_proj=24.0) if both else None)
    assert (config["r"], config["lora_alpha"]) == (3, 12.0)


def test_without_adapters_there_is_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no adapters among these parameters"):
        peft.write(tmp_path / "adapters", tiny_params(tiny_model()), tiny_model(), base="")
