"""How each architecture is cut, parameter by parameter; ``pytest -s`` prints the tables."""

import functools
import math

import jax
import optax
import pytest

from configs.models import MODELS
from rl_reason import sharding
from rl_reason.models import transformer
from rl_reason.models.transformer import ModelConfig

MIB = 2**20
# A model of each architecture on the axes of a pod that suits it: (fsdp, tensor, expert).
TABLES = {
    "Qwen2.5-7B": (16, 2, 1),
    "Qwen3-0.6B": (8, 1, 1),
    "Qwen3-30B-A3B-Base": (4, 2, 8),
    "Llama-3.1-8B": (8, 4, 1),
    "gemma-2-9b": (8, 4, 1),
    "gemma-3-4b-pt": (8, 2, 1),
    "Mixtral-8x7B-v0.1": (8, 1, 8),
    "Intern-S1": (8, 1, 16),
    "Intern-S1-mini": (8, 8, 1),
}
KV_HEADS_WHOLE = ("Qwen3-30B-A3B-Base", 8)  # 4 key heads on tensor=8


@functools.cache
def shapes(name: str):
    layers = dict(scan_layers=True, scan_decode=True, remat="full")
    model = ModelConfig.of(MODELS[name] | dict(dtype="bfloat16", param_dtype="float32") | layers)
    return transformer.param_shapes(model)


def mesh_of(fsdp: int, tensor: int, expert: int) -> jax.sharding.AbstractMesh:
    kinds = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
    return jax.sharding.AbstractMesh((1, fsdp, tensor, expert), sharding.AXES, kinds)


def leaves(tree):
    return {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", TABLES)
def test_the_table(name):
    """Every parameter has a rule; what is a thousandth of the model or more is cut over all devices; moments lie alike."""
    sizes = TABLES[name]
    mesh, params = mesh_of(*sizes), leaves(shapes(name))
    taken, resident = (sharding.bytes_per_device(shapes(name), mesh, resident=decode) for decode in (False, True))
    total = sum(4 * x.size for x in params.values())
    print(f"\n{name}, {total / 2**30:.1f} GiB in float32, on {dict(mesh.shape)}; MiB a device, and in decoding layout")
    for path, x in params.items():
        spec = sharding.param_spec(path, x.shape, mesh)
        print(f"  {path:36} {x.shape!s:28} {spec!s:66} {taken[path] / MIB:9.2f} {resident[path] / MIB:9.2f}")
        if 4 * x.size >= total / 1000:
            assert taken[path] * mesh.size == 4 * x.size, path
    print(f"  {'together':132} {sum(taken.values()) / MIB:9.2f} {sum(resident.values()) / MIB:9.2f}")
    assert sum(taken.values()) < 1.02 * total / mesh.size
    for path, x in params.items():  # what stays cut to decode: tensor, and of experts expert
        cut = mesh.shape["tensor"] * (mesh.shape["expert"] if "/moe/" in path else 1)
        assert resident[path] >= 4 * x.size // cut


@pytest.mark.parametrize("name", TABLES)
def test_moments_lie_like_their_parameters(name):
    mesh = sharding.make_mesh(dict(fsdp=2, tensor=2))
    state = jax.eval_shape(optax.adamw(1e-3).init, shapes(name))
    placed = sharding.like_params(state, shapes(name), mesh)
    expected = {path: x.spec for path, x in leaves(sharding.param_shardings(shapes(name), mesh)).items()}
    for moments in (placed[0].mu, placed[0].nu):
        assert {path: x.spec for path, x in leaves(moments).items()} == expected


def test_fewer_key_heads_than_devices_along_tensor():
    """Keys and values stay whole there, and are cut over fsdp and expert alone; queries are cut."""
    name, tensor = KV_HEADS_WHOLE
    taken = sharding.bytes_per_device(shapes(name), mesh_of(4, tensor, 8))
    params = leaves(shapes(name))
    assert params["layers/attention/k/kernel"].shape[2] < tensor
    for part, over in (("q", 4 * 8 * tensor), ("k", 4 * 8), ("v", 4 * 8)):
        path = f"layers/attention/{part}/kernel"
        assert taken[path] == 4 * math.prod(params[path].shape) // over
