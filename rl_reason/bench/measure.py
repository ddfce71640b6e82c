"""The benchmark: everything that is measured of one config, as one record."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from rl_reason import build
from rl_reason.bench import timing
from rl_reason.bench.loop import compile_parts, measure_loop, trace_parts
from rl_reason.bench.refill import measure_refill
from rl_reason.bench.setting import Bench, Record, draw_prompts, make_verify, measure_rates
from rl_reason.models import transformer

NO_LEARNING = 1e-12  # a learning rate: every update is computed, and the weights, so the lengths, stay as they are


def measure(
    config: build.Config,
    *,
    repeats: int = 5,
    quick: bool = False,
    compare: bool = True,
    full_prompts: bool = False,
    trace: pathlib.Path | None = None,
    tell: Callable[[Record], None] = lambda record: None,
    devices: list | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """Everything, as one JSON-able record. Times are lists of seconds, rates are of their medians.

    Without ``compare`` there is neither host loop nor lock step. ``full_prompts``: as long as prompts may be.
    ``trace``: a folder for a profile of a rollout and an update; ``tell`` hears of all else before that.

    Raises:
        ValueError: what ``build`` refuses.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.optimizer.learning_rate = NO_LEARNING
    experiment = build.build(config, devices)
    machine = timing.machine()
    with jax.set_mesh(experiment.mesh):
        prompts = draw_prompts(experiment, experiment.parts.plan.prompts_drawn, full_prompts)
        params = build.init_params(experiment)
        verify, at_least_s = make_verify(experiment), 2.0 if quick else 15.0
        bench = Bench(experiment, params, prompts, verify, repeats, at_least_s, say, compare, full_prompts)
        say("measuring matmul and copy rates")
        rates = measure_rates(experiment, quick)
        say("compiling rollout, update and fused step")
        compiled = compile_parts(bench)
        found = measure_loop(bench, rates, compiled)
        programs = found["programs"]
        if compare:
            found["refill"] = measure_refill(bench, rates)
            programs = programs | found["refill"]["programs"]
        total, active = transformer.num_params(experiment.parts.model)
        record = {
            "quick": quick,
            "repeats": repeats,
            "machine": machine,
            "model": {"params": total, "params_active": active, **dataclasses.asdict(experiment.parts.model)},
            "batch": dataclasses.asdict(experiment.parts.plan),
            "rates": rates,
            **found,
            "compile_seconds": {
                name: program["trace_seconds"] + program["compile_seconds"] for name, program in programs.items()
            },
            "memory": {"device_peak_bytes": timing.device_peak(), "process_peak_bytes": timing.process_peak()},
        }
        tell(record)
        if trace is not None:
            record["profile"] = trace_parts(bench, compiled, trace)
        return record
