"""Slot refill against lock-step batches, on response lengths as reasoning models have them."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from rl_reason import build, processes
from rl_reason.bench import counts
from rl_reason.bench.host_loop import HostLoop
from rl_reason.bench.setting import Bench, Record, draw_prompts, lengths_of, same_tokens, shares
from rl_reason.bench.timing import Program, compiled, interleaved, median
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig, generate
from rl_reason.sampling import Sampling
from rl_reason.types import Prompts, Rollout

NO_EOS = -1
SIGMA = 0.8  # of the logarithm of a length
MEAN_FRACTION = 0.25  # of the limit
SAMPLES_PER_SLOT = 4


def lognormal_lengths(rows: int, limit: int, seed: int = 0) -> Int[np.ndarray, " rows"]:
    """Tokens, exp(N(mu, SIGMA^2)) of mean MEAN_FRACTION * limit before they are rounded and clipped to 1..limit."""
    mu = math.log(MEAN_FRACTION * limit) - SIGMA**2 / 2
    drawn = np.random.default_rng(seed).lognormal(mu, SIGMA, rows)
    return np.clip(np.rint(drawn), 1, limit).astype(np.int32)


def lock_step(
    params: PyTree,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    config: ModelConfig,
    rollout: RolloutConfig,
    max_new_tokens: Int[Array, " N"],
) -> tuple[Rollout, Int[Array, ""]]:
    """``generate`` in batches of ``num_slots`` rows, each until its longest row ended; one program as well.

    Its slots are never refilled, which is all that differs.
    """
    at_a_time = rollout.num_slots // rollout.group_size
    batches = prompts.tokens.shape[0] // at_a_time
    cut = lambda x: x.reshape(batches, -1, *x.shape[1:])

    def one(batch):
        some, limit = batch
        return generate(params, some, key, sampling, config, rollout, limit)

    out, steps = jax.lax.map(one, (jax.tree.map(cut, prompts), cut(max_new_tokens)))
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    prompt_id = jnp.repeat(jnp.arange(prompts.tokens.shape[0], dtype=jnp.int32), rollout.group_size)
    return dataclasses.replace(out, prompt_id=prompt_id), steps.sum()


class Schedules(typing.NamedTuple):
    """Two programs that draw the same completions, and what they work on."""

    refill: Program
    lock_step: Program
    given: tuple  # their arguments
    on_host: Prompts
    limit: np.ndarray
    rollout: RolloutConfig


def compile_schedules(bench: Bench) -> Schedules:
    """Both schedules, with EOS out of reach and SAMPLES_PER_SLOT times as many samples as slots."""
    experiment, parts = bench.experiment, bench.experiment.parts
    group_size, shards = parts.plan.group_size, parts.rollout.num_shards
    at_a_time = max(parts.rollout.num_slots // group_size // shards, 1) * shards
    rollout = dataclasses.replace(
        parts.rollout, num_slots=at_a_time * group_size, eos_id=NO_EOS, stop_ids=(), stop=(), prefill_rows=0
    )
    on_host = draw_prompts(experiment, SAMPLES_PER_SLOT * at_a_time, bench.full_prompts)
    limit = lognormal_lengths(SAMPLES_PER_SLOT * rollout.num_slots, rollout.completion_len)
    limits = processes.to_global(limit, build.rows_sharding(experiment.mesh))
    given = bench.params, bench.on_device(on_host), bench.rollout_key, experiment.sampling, limits

    def program(run):
        return compiled(jax.jit(lambda *x: run(*x[:4], parts.model, rollout, x[4])), *given)

    return Schedules(program(generate), program(lock_step), given, on_host, limit, rollout)


def measure_refill(bench: Bench, rates: Record) -> Record:
    """Slots that refill, lock-step batches and the host loop: tokens/s on the same completions."""
    bench.say("compiling slot refill and lock-step batches")
    s = compile_schedules(bench)
    host = HostLoop(bench.experiment.parts.model, s.rollout)
    runs = {
        "refill": lambda: s.refill.call(*s.given),
        "lock_step": lambda: s.lock_step.call(*s.given),
        "host": lambda: host(bench.params, s.on_host, bench.rollout_key, bench.experiment.sampling, s.limit),
    }
    bench.say("timing them, and the host loop, on lognormal lengths")
    seconds = interleaved(runs, bench.repeats, bench.at_least_s)
    outs = {name: run() for name, run in runs.items()}
    record: Record = {
        name: schedule_record(bench, rates, s, out, int(steps), seconds[name])
        | {"same_tokens_fraction": same_tokens(outs["refill"][0], out)}
        for name, (out, steps) in outs.items()
    }
    rate = {name: record[name]["tokens_per_s"] for name in outs}
    return record | {
        "slots": s.rollout.num_slots,
        "samples": len(s.limit),
        "limit": s.rollout.completion_len,
        "sigma": SIGMA,
        "mean_fraction": MEAN_FRACTION,
        "mean_length": float(s.limit.mean()),
        "ratio": rate["refill"] / rate["lock_step"],
        "ratio_of_steps": record["lock_step"]["decode_steps"] / record["refill"]["decode_steps"],
        "ratio_to_host": rate["refill"] / rate["host"],
        "programs": {"refill": s.refill.record(), "lock_step": s.lock_step.record()},
    }


def schedule_record(bench: Bench, rates: Record, s: Schedules, out: Rollout, steps: int, seconds: list) -> Record:
    """Rates and shares of one schedule."""
    slots = s.rollout.num_slots
    work = counts.rollout_work(
        bench.experiment.parts.model,
        np.asarray(s.on_host.prompt_len),
        lengths_of(out)[1],
        decode_steps=steps,
        rows_per_step=slots,
    )
    return shares(work, median(seconds), rates) | {
        "seconds": seconds,
        "decode_steps": steps,
        "slot_occupancy": work.tokens / (steps * slots),
    }
