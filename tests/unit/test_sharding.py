"""The mesh and the partition table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rl_reason import build, sharding
from rl_reason.models import transformer
from rl_reason.sharding import FSDP
from tests.support import MOE, config_names, load_config, tiny_model


def mesh(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return sharding.make_mesh(sizes, devices)


def shapes(model):
    return transformer.param_shapes(model)


def specs_of(placed):
    return {sharding.path_name(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(placed)}


def specs(model, mesh):
    return specs_of(sharding.param_shardings(shapes(model), mesh))


@pytest.mark.parametrize("experts", [{}, MOE])
@pytest.mark.parametrize("tied", [True, False])
def test_exactly_one_rule_matches_every_parameter(experts, tied):
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes(tiny_model(tie_embeddings=tied, **experts))):
        name = sharding.path_name(path)
        assert len([rule for rule in sharding.PARTITION_RULES if re.search(rule[0], name)]) == 1, name


def test_dense_table():
    found = specs(tiny_model(tie_embeddings=False), mesh(fsdp=2, tensor=2))
    assert found["embed"] == P(None, FSDP)  # a vocabulary of 13 does not divide
    assert found["unembed"] == P(FSDP, None)
    assert found["layers/attention/q/kernel"] == P(None, FSDP, "tensor", None)
    assert found["layers/attention/out/kernel"] == P(None, "tensor", None, FSDP)
    assert found["layers/mlp/gate/kernel"] == found["layers/mlp/up/kernel"] == P(None, FSDP, "tensor")
    assert found["layers/mlp/down/kernel"] == P(None, "tensor", FSDP)
    norms = [name for name in found if "norm" in name]
    assert len(norms) == 5 and all(not any(found[name]) for name in norms)


def test_expert_table():
    found = specs(tiny_model(**MOE), mesh(fsdp=2, expert=2))
    assert found["layers/moe/gate"] == found["layers/moe/up"] == P(None, "expert", "fsdp", "tensor")
    assert found["layers/moe/down"] == P(None, "expert", "tensor", "fsdp")
    assert found["layers/moe/router"] == P(None, FSDP, None)


@pytest.mark.parametrize("name", config_names())
def test_configs_name_a_mesh_that_this_machine_can_make(name):
    made = sharding.make_mesh(load_config(name).mesh.to_dict())
    assert made.axis_names == sharding.AXES and made.size == jax.device_count()


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"No partition rule matches parameter 'layers/lora' \(2, 3\); add one"):
        sharding.param_spec("layers/lora", (2, 3), mesh(data=1))


@pytest.mark.parametrize("sizes, shape", [(dict(data=-1), (4, 1, 1, 1)), (dict(fsdp=2, tensor=-1), (1, 2, 2, 1))])
def test_minus_one_is_what_is_left(sizes, shape):
    made = sharding.make_mesh(sizes)
    assert tuple(made.shape.values()) == shape
    assert sharding.num_row_shards(made) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "sizes, says",
    [
        (dict(data=3), "mesh(data=3, fsdp=1, tensor=1, expert=1) does not cover 4 devices; make the product 4."),
        (dict(data=-1, fsdp=3), "mesh(data=-1, fsdp=3, tensor=1, expert=1) does not cover 4 devices"),
        (dict(data=-1, fsdp=-1), "mesh(data=-1, fsdp=-1, tensor=1, expert=1) does not cover 4 devices"),
        (dict(dat=4), "mesh: unknown axes ['dat']; the axes are data, fsdp, tensor, expert."),
    ],
)
def test_a_mesh_that_cannot_be(sizes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        sharding.make_mesh(sizes)


def test_optimizer_moments_lie_like_their_parameters():
    params, over = shapes(tiny_model()), mesh(fsdp=2, tensor=2)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    placed = sharding.like_params(state, params, over)
    for moments in (placed[0].mu, placed[0].nu):
        assert specs_of(moments) == specs_of(sharding.param_shardings(params, over))
    assert placed[0].count.spec == P()


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.arange(4)
    assert sharding.constrain_rows({"x": x})["x"] is x


def test_judges_lie_like_parameters_of_their_own_shapes():
    """Dense models of other widths beside a mixture: none of their matrices is whole on a device."""
    config = load_config("intern_s1")
    config.mesh.update(data=1, fsdp=2, tensor=2)
    experiment = build.build(config, jax.devices()[:4])
    placed = build.state_shardings(experiment.parts, experiment.mesh).models
    for name, judge in experiment.parts.judges.items():
        params = sharding.param_shardings(transformer.param_shapes(judge.model), experiment.mesh)
        found = placed[name]["params"]
        assert specs_of(found.get("backbone", found)) == specs_of(params)
    assert placed["judge"]["params"]["embed"].spec == P("tensor", sharding.FSDP)
