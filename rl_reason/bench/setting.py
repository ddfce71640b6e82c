"""What the measurements share: an experiment, its weights and prompts, and how a result is told."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from rl_reason import build, processes, rewards
from rl_reason.bench import timing
from rl_reason.bench.counts import Work
from rl_reason.data.stream import prompt_stream
from rl_reason.loop import step as step_lib
from rl_reason.types import Prompts, Rollout, TrainState, Verdicts, Verify

Record = dict[str, typing.Any]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    experiment: build.Experiment
    params: PyTree
    prompts: Prompts  # numpy, [B ...]
    verify: Verify
    repeats: int
    at_least_s: float  # of timing, for each of the two comparisons
    say: Callable[[str], None]
    compare: bool = True  # with a host loop and lock-step batches
    full_prompts: bool = False  # as long as prompts may be, in the comparisons too

    @property
    def rollout_key(self) -> Key[Array, ""]:
        """What the fused step draws its completions with."""
        return jax.random.fold_in(jax.random.key(self.experiment.config.seed), step_lib.ROLLOUT)

    def on_device(self, prompts: Prompts, leading: int = 0) -> Prompts:
        return processes.to_global(prompts, build.rows_sharding(self.experiment.mesh, leading))

    def new_state(self) -> TrainState:
        return build.init_state(self.experiment, self.experiment.parts, self.params)


def draw_prompts(experiment: build.Experiment, count: int, full: bool = False) -> Prompts:
    """The first ``count`` training prompts, on the host; ``full`` repeats each until it is as long as prompts may be."""
    config = experiment.config
    stream = prompt_stream(
        experiment.train,
        experiment.tokenizer,
        batch_size=count,
        prompt_len=config.data.max_prompt_len_tokens,
        reference_len=config.data.max_reference_len_tokens if config.verify == "graph" else None,
    )
    prompts = next(stream)
    if not full:
        return prompts
    width = prompts.tokens.shape[1]
    repeated = [np.resize(row[:length], width) for row, length in zip(prompts.tokens, prompts.prompt_len, strict=True)]
    new = {"tokens": np.stack(repeated), "prompt_len": np.full_like(prompts.prompt_len, width)}
    return jax.tree_util.tree_map_with_path(lambda path, x: new.get(path[0].name, x), prompts)


def make_verify(experiment: build.Experiment) -> Verify:
    """The config's verifier where it is in graph; otherwise every other sample counts as right, at no cost."""
    plan = experiment.parts.plan
    if experiment.config.verify == "graph":
        return rewards.in_graph(
            experiment.train.names,
            experiment.tokenizer,
            group_size=plan.group_size,
            completion_len=experiment.parts.rollout.completion_len,
        )

    def alternate(rollout: Rollout, prompts: Prompts) -> Verdicts:
        rows = jnp.arange(rollout.tokens.shape[0])
        return Verdicts((rows % 2).astype(rollout.rollout_logprobs.dtype), jnp.ones(rows.shape, bool))

    return alternate


def measure_rates(experiment: build.Experiment, quick: bool) -> Record:
    """What a device does at best, and all of the mesh together."""
    seconds = 0.2 if quick else 2.0
    matmul = timing.matmul_rate(experiment.parts.model.dtype, seconds)
    copy = timing.copy_rate(seconds, 64 if quick and jax.default_backend() == "cpu" else None)
    # Devices that a CPU plays share its cores.
    devices = 1 if jax.default_backend() == "cpu" else experiment.mesh.size
    return {
        "matmul": matmul,
        "copy": copy,
        "devices": devices,
        "matmul_flops_per_s": devices * matmul["flops_per_s"],
        "copy_bytes_per_s": devices * copy["bytes_per_s"],
    }


def shares(work: Work, seconds: float, rates: Record) -> Record:
    """Tokens/s and the shares of the machine's measured rates that some work reached in ``seconds``."""
    flops, copied = rates["matmul_flops_per_s"], rates["copy_bytes_per_s"]
    floor = work.seconds(flops, copied)
    return {
        "median_seconds": seconds,
        "tokens": work.tokens,
        "tokens_per_s": work.tokens / seconds,
        "model_flops": work.flops,
        "model_bytes": work.num_bytes,
        "matmul_share": work.flops / seconds / flops,
        "copy_share": work.num_bytes / seconds / copied,
        "roofline_seconds": floor,
        "roofline_share": floor / seconds,
        "bound": "matmul" if work.flops / flops >= work.num_bytes / copied else "memory",
    }


def lengths_of(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, completion) tokens of each row."""
    mask, prompt_len = processes.to_host((rollout.completion_mask, rollout.prompt_len))
    return prompt_len, mask.sum(1)


def same_tokens(a: Rollout, b: Rollout) -> float:
    """Share of rows that are equal token for token."""
    same = (np.asarray(a.tokens) == np.asarray(b.tokens)) & (
        np.asarray(a.completion_mask) == np.asarray(b.completion_mask)
    )
    return float(same.all(1).mean())
