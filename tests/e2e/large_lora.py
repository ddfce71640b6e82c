"""python -m tests.e2e.large_lora make|step FOLDER, each a process of its own, because a memory peak is a process's.

``make`` writes a checkpoint of Qwen2.5-1.5B's shape with random bf16 weights to FOLDER/base. ``step`` reads it, does one RL
step of two prompts with two samples each on adapters, and writes FOLDER/merged. Prints GiB of resident memory, at its peak.
"""

import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from configs.models import MODELS
from rl_reason import build, sharding
from rl_reason.drivers.reinforcement import Reinforcement
from rl_reason.models import hf_export, hf_weights
from rl_reason.models.hf_files import Checkpoint
from rl_reason.sharding import path_name
from rl_reason.verifier_pool import VerifierPool

NAME = "Qwen2.5-1.5B"
TARGET = "model.layers.3.mlp.down_proj.weight"


def experiment() -> build.Experiment:
    """A step of 2 x 2 rows of 8 tokens, whose gradient is entropy's, because nothing that random weights write is right."""
    config = base.get_config("smoke")
    bf16 = dict(dtype="bfloat16", param_dtype="bfloat16")
    config.model.update(MODELS[NAME], **bf16, scan_layers=True, scan_decode=True, remat="full")
    config.lora.rank = 16
    config.num_steps = config.steps_per_call = 1
    config.warmup.num_steps = config.checkpoint.every = config.evaluation.num_prompts = 0
    config.rollout.update(completion_len=8, num_slots=4)
    config.batch.update(prompts_per_step=2, group_size=2, train_group_size=2, generated_prompts=2, minibatches=1)
    config.regularisers.entropy = dict(coef=1.0, how="token_mean", divisor=1.0)
    config.optimizer.update(learning_rate=1e-2, lr_warmup_updates=0)  # so that a step is more than bf16's rounding
    return build.build(config, jax.devices()[:1])


def said(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - began:.0f} s, peak {peak:.2f} GiB", flush=True)


def make(folder: pathlib.Path) -> None:
    """A million numbers, again and again: what they are is of no account."""
    began, model = time.perf_counter(), experiment().parts.model
    block = (0.02 * np.random.default_rng(0).standard_normal(2**20 + 7)).astype(jnp.bfloat16)

    def fill(path, x):
        return np.ones(x.shape, x.dtype) if "norm" in path_name(path) else np.resize(block, x.shape)

    params = jax.tree_util.tree_map_with_path(fill, hf_weights.shapes_of(model))
    hf_export.write(folder / "base", params, model, dtype="bfloat16")
    said("made", began)


def step(folder: pathlib.Path) -> None:
    began, ours = time.perf_counter(), experiment()
    model = ours.parts.model
    with jax.set_mesh(ours.mesh), VerifierPool(1, 5.0) as pool:
        params = hf_weights.read(
            folder / "base", model, sharding.param_shardings(hf_weights.shapes_of(model), ours.mesh)
        ).params
        said("read", began)
        driver = Reinforcement(ours, pool)
        state = driver.initial_state(params)
        del params
        said("ready", began)
        out = driver.advance(state)
        said("stepped", began)
        metrics = {name: float(x[0]) for name, x in out.metrics.items()}
        for name in ("actor/grad_norm", "actor/entropy", "rollout_corr/abs_diff_mean", "actor/skipped_updates"):
            print(f"{name} {metrics[name]:.4g}")
        assert metrics["actor/grad_norm"] > 0 and metrics["actor/skipped_updates"] == 0
        hf_export.write(folder / "merged", out.state.params, model, dtype="bfloat16")
        said("written", began)
    check(folder, out.state.params)


def check(folder: pathlib.Path, params) -> None:
    """What has no adapter is as it was, bit for bit; what has one is W + A B."""
    before, after = Checkpoint(folder / "base"), Checkpoint(folder / "merged")
    assert before.names == after.names
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.3.self_attn.q_proj.bias"):
        assert np.array_equal(before.read(name).view(np.uint16), after.read(name).view(np.uint16)), name
    down = jax.tree.map(lambda x: np.asarray(x[3], np.float32), params["layers"]["mlp"]["down"])
    want = down["kernel"] + down["lora_scale"] * (down["lora_a"] @ down["lora_b"])
    got = np.asarray(after.read(TARGET), np.float32).T
    assert np.all(np.abs(got - want) <= np.abs(want) * 2.0**-8) and not np.array_equal(got, down["kernel"])


if __name__ == "__main__":
    {"make": make, "step": step}[sys.argv[1]](pathlib.Path(sys.argv[2]))
