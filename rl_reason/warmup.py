"""The supervised warm-up: worked solutions before rewards, cached by the hash of everything that made it."""

import time
import typing
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from rl_reason import build, cache, processes, sharding
from rl_reason.data.sources import Source
from rl_reason.data.stream import supervised_stream
from rl_reason.loop import supervised
from rl_reason.models import hf_files, hf_weights, transformer

MADE_BY = (
    *("models", "data", "tasks", "build.py", "sharding.py", "warmup.py", "cache.py"),
    *("loop/supervised.py", "loop/update.py", "loop/optimizer.py", "loop/partition.py"),
)


class WarmedUp(typing.NamedTuple):
    """Parameters, the seconds it took, and whether they came from the cache."""

    params: PyTree
    seconds: float
    cached: bool


def fingerprint(experiment: build.Experiment) -> str:
    """A name for these warm-up weights: config, tokenizer, data, code and jax."""
    config = experiment.config
    parts: dict[str, typing.Any] = {key: config[key].to_dict() for key in ("model", "data", "warmup")}
    parts |= {key: config.optimizer[key] for key in ("b1", "b2", "eps", "mu_dtype", "grad_clip")}
    parts |= dict(seed=config.seed, tokenizer=experiment.tokenizer.fingerprint)
    if config.weights:
        parts |= dict(weights=hf_files.identity(config.weights))
    warm = build.warmup_source(config, experiment.tokenizer)
    parts |= dict(source=experiment.train.fingerprint, warm=warm.fingerprint)
    return cache.fingerprint(parts, MADE_BY)


def initial(
    experiment: build.Experiment, on_tensor: hf_weights.OnTensor = lambda done, total: None
) -> hf_weights.Loaded:
    """Parameters before any training: random, or those of ``config.weights``, of which ``on_tensor`` hears.

    Raises:
        WeightsError: a checkpoint that is not whole, or of another model.
    """
    if not experiment.config.weights:
        return hf_weights.Loaded(build.init_params(experiment), [], [])
    model = experiment.parts.model
    shardings = sharding.param_shardings(transformer.param_shapes(model), experiment.mesh)
    return hf_weights.read(experiment.config.weights, model, shardings, on_tensor)


def warm_up(
    experiment: build.Experiment, params: PyTree, on_step: Callable[[int, dict[str, float]], None]
) -> WarmedUp:
    """Weights to start RL from, made of ``initial`` ones; ``on_step(step, metrics)`` hears of every chunk."""
    began = time.perf_counter()
    if not total_steps(experiment):
        return WarmedUp(params, 0.0, False)
    place = cache.cache_root() / "warmup" / fingerprint(experiment)
    kept = cache.read_or_make(place, params, lambda: train(experiment, params, on_step))
    return WarmedUp(kept.tree, time.perf_counter() - began, kept.cached)


def total_steps(experiment: build.Experiment) -> int:
    """Of the warm-up and of the imitation that may follow it."""
    return experiment.config.warmup.num_steps + experiment.config.warmup.imitation_steps


def unchanged(experiment: build.Experiment) -> str:
    """The checkpoint that the policy begins with as it came; "" where a warm-up changes it, or there is none."""
    return "" if total_steps(experiment) else experiment.config.weights


def train(
    experiment: build.Experiment,
    params: PyTree,
    on_step: Callable[[int, dict[str, float]], None],
) -> PyTree:
    """Maximum likelihood on the warm-up's worked solutions, then on the data's own."""
    w = experiment.config.warmup
    warm = build.warmup_source(experiment.config, experiment.tokenizer)
    params = _imitate(experiment, params, warm, w.num_steps, on_step)
    later = lambda step, metrics: on_step(w.num_steps + step, metrics)
    own = build.make_source_of(experiment.config, experiment.tokenizer, "train")
    return _imitate(experiment, params, own, w.imitation_steps, later)


def _imitate(
    experiment: build.Experiment,
    params: PyTree,
    source: Source,
    num_steps: int,
    on_step: Callable[[int, dict[str, float]], None],
) -> PyTree:
    """``num_steps`` of maximum likelihood, each with a fresh optimizer and schedule."""
    if not num_steps:
        return params
    config, parts = experiment.config, experiment.supervised
    w = config.warmup
    rows = build.rows_sharding(experiment.mesh, leading=1)
    stream = supervised_stream(
        source,
        experiment.tokenizer,
        batch_size=w.batch_size,
        prompt_len=config.data.max_prompt_len_tokens,
        demonstration_len=config.data.max_demonstration_len_tokens,
        direct_share=w.direct_share,
        rows=processes.local_rows(build.rows_sharding(experiment.mesh), w.batch_size),
    )
    chunk = jax.jit(supervised.make_chunk(parts), donate_argnums=0)
    state = build.init_state(experiment, parts, params)
    for done in range(0, num_steps, w.steps_per_call):
        drawn = [next(stream) for _ in range(w.steps_per_call)]
        tokens, loss_mask = (np.stack(x) for x in zip(*drawn, strict=True))
        batches = supervised.Demonstrations(*processes.to_global((tokens, loss_mask), rows))
        state, metrics = chunk(state, batches)
        last = {name: float(x[-1]) for name, x in processes.to_host(metrics).items()}
        counted = float(loss_mask.sum())
        on_step(done + w.steps_per_call, last | {"loss": last["sft/loss"], "tokens": counted})
    return state.params
