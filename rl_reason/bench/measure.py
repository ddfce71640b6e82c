"""The benchmark: everything that is measured of one config, as one record."""

import dataclasses
from collections.abc import Callable

import jax

from rl_reason import build
from rl_reason.bench import timing
from rl_reason.bench.loop import measure_loop
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
    devices: list | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """Everything, as one JSON-able record. Times are lists of seconds, rates are of their medians.

    Without ``compare`` there is neither host loop nor lock step. ``full_prompts``: as long as prompts may be.

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
        at_least_s = 2.0 if quick else 15.0
        bench = Bench(experiment, params, prompts, make_verify(experiment), repeats, at_least_s, say, compare)
        say("measuring matmul and copy rates")
        rates = measure_rates(experiment, quick)
        loop = measure_loop(bench, rates)
        refill = measure_refill(bench, rates) if compare else None
    total, active = transformer.num_params(experiment.parts.model)
    return {
        "quick": quick,
        "repeats": repeats,
        "machine": machine,
        "model": {"params": total, "params_active": active, **dataclasses.asdict(experiment.parts.model)},
        "batch": dataclasses.asdict(experiment.parts.plan),
        "rates": rates,
        **loop,
        **({} if refill is None else {"refill": refill}),
        "compile_seconds": {
            name: program["trace_seconds"] + program["compile_seconds"]
            for name, program in (loop["programs"] | (refill["programs"] if refill else {})).items()
        },
        "memory": {"device_peak_bytes": timing.device_peak(), "process_peak_bytes": timing.process_peak()},
    }
