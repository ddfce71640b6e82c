"""Rollout, update and the whole step: compiled, and driven from the host a token at a time."""

import dataclasses
import functools
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np

from rl_reason import build, processes
from rl_reason.bench import counts
from rl_reason.bench.host_loop import HostLoop
from rl_reason.bench.profile import profile
from rl_reason.bench.setting import Bench, Record, lengths_of, same_tokens, shares
from rl_reason.bench.timing import Program, compiled, interleaved, median
from rl_reason.loop import chunk as chunk_lib
from rl_reason.loop import step as step_lib
from rl_reason.rollout import RolloutConfig
from rl_reason.types import Prompts, Rollout, Verdicts


class Programs(typing.NamedTuple):
    """The compiled parts of a step, and what they work on."""

    draw: Program
    judge: Program
    learn: Program
    fused: Program  # ``steps`` whole steps
    prompts: Prompts
    stacked: Prompts  # the same ones for each of ``steps`` steps
    rollout: Rollout
    verdicts: Verdicts
    decode_steps: jax.Array
    steps: int


def compile_parts(bench: Bench) -> Programs:
    """Compiles rollout, verifier, update and fused step, and runs the first two once."""
    experiment, parts, sampling = bench.experiment, bench.experiment.parts, bench.experiment.sampling
    steps = experiment.config.steps_per_call
    prompts = bench.on_device(bench.prompts)
    stacked = bench.on_device(jax.tree.map(lambda x: np.stack([x] * steps), bench.prompts), leading=1)
    state = bench.new_state()
    placed = None if experiment.mesh.size == 1 else build.state_shardings(parts, experiment.mesh)
    draw = compiled(jax.jit(functools.partial(step_lib.sample_phase, parts)), state, prompts, sampling)
    rollout, decode_steps = jax.block_until_ready(draw.call(state, prompts, sampling))
    judge = compiled(jax.jit(bench.verify), rollout, prompts)
    verdicts = judge.call(rollout, prompts)
    update = jax.jit(
        functools.partial(step_lib.learn_phase, parts),
        donate_argnums=0,
        out_shardings=None if placed is None else (placed, None, None),
    )
    learn = compiled(update, state, prompts, rollout, verdicts, decode_steps, sampling)
    chunk = jax.jit(
        chunk_lib.make_chunk(parts, bench.verify),
        donate_argnums=0,
        out_shardings=None if placed is None else (placed, None),
    )
    fused = compiled(chunk, state, stacked, sampling)
    return Programs(draw, judge, learn, fused, prompts, stacked, rollout, verdicts, decode_steps, steps)


def time_parts(bench: Bench, p: Programs, host: HostLoop | None) -> dict[str, list[float]]:
    """Seconds of rollout, update, step, and the host loop's rollout and step if there is one, taken in turn."""
    sampling = bench.experiment.sampling
    placed = jax.tree.map(lambda x: x.sharding, p.rollout)
    state = bench.new_state()  # every update consumes it and leaves another

    def learn(rollout, verdicts, decode_steps):
        nonlocal state
        state, *out = p.learn.call(state, p.prompts, rollout, verdicts, decode_steps, sampling)
        return state, out

    def step_by_host(draw_by_host):
        drawn, count = draw_by_host()
        drawn = jax.device_put(drawn, placed)
        return processes.to_host(learn(drawn, p.judge.call(drawn, p.prompts), jnp.int32(count))[1])

    def fused():
        nonlocal state
        state, out = p.fused.call(state, p.stacked, sampling)
        return processes.to_host(out)

    things = {
        "rollout": lambda: p.draw.call(state, p.prompts, sampling),
        "update": lambda: learn(p.rollout, p.verdicts, p.decode_steps),
        "step": fused,
    }
    if host is not None:
        draw_by_host = functools.partial(host, bench.params, bench.prompts, bench.rollout_key, sampling)
        things |= {"host_rollout": draw_by_host, "host_step": lambda: step_by_host(draw_by_host)}
    seconds = interleaved(things, bench.repeats, bench.at_least_s)
    return seconds | {"step": [s / p.steps for s in seconds["step"]]}


def measure_loop(bench: Bench, rates: Record, p: Programs) -> Record:
    """Everything about one step of training."""
    bench.say("timing them, and the host loop" if bench.compare else "timing them")
    slots = lock_step_slots(p.rollout, bench)
    host = HostLoop(bench.experiment.parts.model, slots) if bench.compare else None
    seconds = time_parts(bench, p, host)
    programs = {"rollout": p.draw, "verify": p.judge, "update": p.learn, "step": p.fused}
    record = loop_record(bench, rates, p.rollout, int(p.decode_steps), seconds)
    record["programs"] = {name: program.record() for name, program in programs.items()}
    if host is not None:
        by_host, calls = host(bench.params, bench.prompts, bench.rollout_key, bench.experiment.sampling)
        record["host_loop"] = compare_host(seconds, p.rollout, by_host, calls) | {"rows_at_a_time": slots.num_slots}
    return record


def trace_parts(bench: Bench, p: Programs, folder: pathlib.Path) -> dict[str, Record]:
    """Rollout and update, a call of each."""
    bench.say(f"tracing them into {folder}")
    state, sampling = bench.new_state(), bench.experiment.sampling
    rollout = lambda: p.draw.call(state, p.prompts, sampling)
    update = lambda: p.learn.call(state, p.prompts, p.rollout, p.verdicts, p.decode_steps, sampling)
    return profile(folder, dict(rollout=rollout, update=update))


def lock_step_slots(rollout: Rollout, bench: Bench) -> RolloutConfig:
    """The loop's own slots, or as many fewer as cut the prompts into whole lock-step batches."""
    config = bench.experiment.parts.rollout
    prompts, shards = rollout.tokens.shape[0] // config.group_size, config.num_shards
    fits = max(config.num_slots // config.group_size, shards)
    at_a_time = max(n for n in range(shards, fits + 1, shards) if prompts % n == 0)
    return dataclasses.replace(config, num_slots=at_a_time * config.group_size)


def loop_record(bench: Bench, rates: Record, rollout: Rollout, decode_steps: int, seconds: dict) -> Record:
    """Rates and shares of rollout, update and step."""
    parts, plan = bench.experiment.parts, bench.experiment.parts.plan
    prompt_lens, completion_lens = lengths_of(rollout)
    drawn = counts.rollout_work(
        parts.model,
        prompt_lens[:: plan.group_size],
        completion_lens,
        decode_steps=decode_steps,
        rows_per_step=parts.rollout.num_slots,
    )
    trained = slice(
        None, None, len(prompt_lens) // plan.rows
    )  # where some are dropped, every so many stand for the rest
    scorings = int(plan.updates_per_step > 1) + int(parts.wants("ref_logprobs"))
    learnt = counts.update_work(
        parts.model,
        prompt_lens[trained][: plan.rows],
        completion_lens[trained][: plan.rows],
        epochs=plan.epochs,
        scorings=scorings,
        updates=plan.updates_per_step,
        passes=plan.updates_per_step * plan.microbatches,
    )
    tokens = int(prompt_lens.sum() + completion_lens.sum())
    both = (drawn + learnt)._replace(tokens=tokens)
    step = shares(both, median(seconds["step"]), rates)
    rolled = shares(drawn, median(seconds["rollout"]), rates)
    slots = parts.rollout.num_slots
    return {
        "rollout": rolled
        | {
            "seconds": seconds["rollout"],
            "decode_steps": decode_steps,
            "bytes_per_decode_step": drawn.num_bytes / decode_steps,
            "slot_occupancy": drawn.tokens / (decode_steps * slots),
            "mean_length": float(completion_lens.mean()),
        },
        "update": shares(learnt, median(seconds["update"]), rates) | {"seconds": seconds["update"]},
        "step": step | {"seconds": seconds["step"], "mfu": step["matmul_share"]},
    }


def compare_host(seconds: dict[str, list[float]], fused: Rollout, host: Rollout, calls: int) -> Record:
    """The compiled loop over the host loop; ratios above 1 are in favour of the compiled one."""
    rolled, stepped = median(seconds["host_rollout"]), median(seconds["host_step"])
    tokens = int(host.completion_mask.sum())
    return {
        "rollout_seconds": seconds["host_rollout"],
        "step_seconds": seconds["host_step"],
        "calls": calls,
        "seconds_per_call": rolled / calls,
        "tokens": tokens,
        "rollout_tokens_per_s": tokens / rolled,
        "same_tokens_fraction": same_tokens(fused, host),
        "rollout_ratio": rolled / median(seconds["rollout"]) * int(fused.completion_mask.sum()) / tokens,
        "step_ratio": stepped / median(seconds["step"]),
    }
