"""python -m tests.e2e.one_step make|step FOLDER: a checkpoint of Qwen2.5-1.5B's shape with random weights in bf16; or one
RL step of two prompts, two samples each, with adapters on it, and a checkpoint of what came out. Says what memory peaks at.

A process of its own, because a peak is a process's.
"""

import dataclasses
import functools
import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from configs.models import MODELS
from rl_reason import build, cache, processes
from rl_reason.drivers.reinforcement import Reinforcement
from rl_reason.models import hf_export, hf_weights, transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.verifier_pool import VerifierPool

SHAPE = MODELS["Qwen2.5-1.5B"] if "Qwen2.5-1.5B" in MODELS else MODELS["Qwen2.5-Math-1.5B"]


def experiment() -> build.Experiment:
    config = base.get_config("smoke")
    config.model.update(
        SHAPE, dtype="bfloat16", param_dtype="bfloat16", scan_layers=True, scan_decode=True, remat="full"
    )
    config.lora.rank = 16
    config.warmup.num_steps = 0
    config.steps_per_call = config.num_steps = 1
    config.evaluation.num_prompts = 0
    config.checkpoint.every = 0
    config.rollout.update(completion_len=8, num_slots=4)
    config.batch.update(prompts_per_step=2, group_size=2, train_group_size=2, generated_prompts=2, minibatches=1)
    config.reward.update(
        fn=...,
    )
    return build.build(config, jax.devices()[:1])
