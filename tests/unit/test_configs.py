"""Bad values are refused before anything compiles, naming the key and the cure; and what the schedules mean."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import call, term
from experiments import config_files
from rl_reason import build, learning
from rl_reason.loop.chunk import make_step
from rl_reason.sampling import make_sampling
from rl_reason.tasks import TASKS
from rl_reason.tasks.in_graph import IN_GRAPH
from tests.support import load_config, one_device, parity_verify, tiny_params, tiny_parts, tiny_prompts

HOST_ONLY = sorted(set(TASKS) - IN_GRAPH)[0]


def kl(**changes):
    return ConfigDict(dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0) | changes)


def changed(**changes):
    """base.py:smoke with dotted keys set (dots written as two underscores)."""
    config = load_config("base")
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(verify="grph"), "config.verify='grph'; there are graph, callback, split, overlapped."),
        (dict(objective_scope="batch"), "config.objective_scope='batch'; there are minibatch, microbatch."),
        (
            dict(num_steps=5),
            "config.num_steps=5 is no multiple of config.steps_per_call=2: the compiled loop runs 2 steps at a time. "
            "Nearest: 4 or 6.",
        ),
        (dict(steps_per_call=0), "config.steps_per_call=0"),
        (dict(checkpoint__every=3), "config.checkpoint.every=3 is no multiple of config.steps_per_call=2"),
        (dict(evaluation__every=1), "config.evaluation.every=1 is no multiple of config.steps_per_call=2"),
        (dict(warmup__num_steps=5), "config.warmup.num_steps=5 is no multiple of warmup.steps_per_call=2"),
        (dict(mesh__data=3), "mesh(data=3, fsdp=1, tensor=1, expert=1) does not cover 1 devices"),
        (dict(data__tasks=("add", "sort", "modd")), "modd"),
        (dict(data__tasks=("add",)), "data.levels has 3 entries for 1 tasks"),
        (
            dict(data__tasks=("add", HOST_ONLY), data__levels=None),
            f"no in-graph verifier for {HOST_ONLY}; there is one",
        ),
        (dict(data__tasks=(), data__levels=None), "tasks"),
        (dict(batch__minibatches=3), "config.batch does not divide: prompts_per_step=8 / minibatches=3"),
        (dict(rollout__temperature=0.0), "config.rollout.temperature must be above 0 for training"),
        (dict(rollout__top_p=0.0), "want temperature >= 0, top_k >= 0 (0 is off), 0 < top_p <= 1"),
        (dict(rollout__check_every=0), "check_every"),
        (dict(rollout__prefill_rows=3), "prefill_rows=3"),
        (dict(model__num_kv_heads=3), "model.num_heads=2 is no multiple of num_kv_heads=3"),
        (
            dict(regularisers__kl=call("", coef=0.1)),
            "config.regularisers.kl has keys ['coef', 'fn']; it takes exactly",
        ),
        (dict(regularisers__kl=kl(estimator="k4")), "kl.estimator='k4'; there are k1, k2, k3."),
        (dict(regularisers__kl=kl(how="mean")), "how='mean'"),
        (
            dict(regularisers__entropy=kl()),
            "config.regularisers.entropy has keys ['coef', 'divisor', 'estimator', 'how']",
        ),
        (dict(aggregation__policy=term("mean")), "config.aggregation.policy.how='mean'; there are token_mean"),
        (dict(objective=call("grpo.objective")), "config.objective = call('grpo.objective', ...): missing"),
        (dict(objective=None), "config.objective is None"),
        (dict(reward=call("ttrl.reward"), verify="split"), "nobody would have a vote. Set config.answer_rule='equiv"),
        (dict(optimizer__lr_decay="cos"), "config.optimizer.lr_decay='cos'; there are constant, cosine, linear."),
        (dict(optimizer__lr_end_fraction=2.0), "config.optimizer.lr_end_fraction=2.0 is not in 0..1."),
        (dict(model__vocab_size=9), "config.model.vocab_size=9 is less than the"),
        (
            dict(tokenizer="nowhere"),
            "config.tokenizer='nowhere': no file or folder 'nowhere'; give 'embedded', a sentencepiece model",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        build.build(changed(**changes), one_device())


def test_slots_that_do_not_divide_over_devices():
    with pytest.raises(
        ValueError, match=r"8 prompts and rollout\.num_slots=6 must both be multiples of the 4 row shards"
    ):
        build.build(changed(rollout__num_slots=6), jax.devices()[:4])


def test_an_aggregation_of_other_terms_than_the_objective_returns():
    parts = tiny_parts(changed(aggregation__entropy=term("token_mean")))
    step = make_step(parts, parity_verify)
    state = build.new_state(parts, tiny_params(parts.model), 0)
    with pytest.raises(
        ValueError, match=r"returns the terms \['policy'\], config\.aggregation reduces \['entropy', 'pol"
    ):
        jax.eval_shape(step, state, tiny_prompts(), make_sampling(1.0))


def test_a_kl_regulariser_makes_the_loop_keep_a_reference():
    with_kl = tiny_parts(changed(regularisers__kl=kl()))
    assert with_kl.keeps_reference and not tiny_parts("base").keeps_reference
    params = tiny_params(with_kl.model)
    assert build.new_state(with_kl, params, 0).ref_params is not None
    assert build.new_state(tiny_parts("base"), params, 0).ref_params is None


def rates(decay, total, updates, warm=4, end=0.0):
    options = dict(learning_rate=1.0, lr_warmup_updates=warm, lr_decay=decay, lr_end_fraction=end)
    schedule = learning.rl_schedule(options, total)
    return [float(schedule(jnp.int32(u))) for u in updates]


def test_schedules_by_hand():
    # Warm-up from 1/4 to 1 over 4 updates, then 8 of decay: half way is update 8.
    assert rates("constant", 12, (0, 2, 4, 12)) == pytest.approx([0.25, 0.625, 1.0, 1.0])
    assert rates("linear", 12, (0, 4, 8, 12)) == pytest.approx([0.25, 1.0, 0.5, 0.0])
    assert rates("cosine", 12, (4, 8, 12)) == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert rates("linear", 12, (4, 8, 12), end=0.2) == pytest.approx([1.0, 0.6, 0.2])
    assert rates("cosine", 12, (4, 8, 12), end=0.2) == pytest.approx([1.0, 0.6, 0.2])
    assert rates("constant", 12, (0,), warm=0) == [1.0]
    assert rates("constant", 1, (0, 1)) == [1.0, 1.0]  # a run shorter than its warm-up


def test_weight_decay_spares_norms():
    options = dict(grad_clip=1.0, b1=0.9, b2=0.99, eps=1e-8, mu_dtype=None, weight_decay=0.5)
    optimizer = learning.adamw(options, lambda _: 0.1)
    params = {"embed": jnp.ones((2, 2)), "layers": {"mlp_norm": {"scale": jnp.ones((1, 2))}}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.1 * 0.5, rtol=1e-6)  # -rate * decay * parameter
    np.testing.assert_array_equal(updates["layers"]["mlp_norm"]["scale"], 0.0)


def test_config_files_are_found_by_bare_names():
    found = str(config_files.CONFIGS / "clipcov.py")
    for words in (["--config=clipcov.py"], ["--config", "clipcov"], ["-config=clipcov"], [f"--config={found}"]):
        assert config_files.resolved(["run", *words]) == ["run", f"--config={found}"]
    assert config_files.resolved(["--config=clipcov:smoke"]) == [f"--config={found}:smoke"]
    assert config_files.name_of(["--config=clipcov.py:smoke"]) == "clipcov-smoke"


def test_unknown_config_files_are_answered_with_those_there_are():
    with pytest.raises(
        SystemExit, match=r"no such file\. Did you mean clipcov\.py\? In configs/ there are: .*base\.py, "
    ):
        config_files.resolved(["--config=clipcv.py"])
    assert "common.py" not in config_files.known()
