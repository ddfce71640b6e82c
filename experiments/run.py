"""python -m experiments.run --config=clipcov.py[:arg] [--config.key=value ...] [--run=DIR] [--resume]

Trains what a config describes and leaves everything about it in one directory.
"""

import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from experiments import config_files

_RUN = flags.DEFINE_string("run", None, "Directory of the run, below runs/ unless it has a slash; default: a new one.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on with the run that --run names.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join other processes, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as the cluster says.",
)
# On resume: what changes no step, and what a run that stopped on non-finite gradients is told to change.
MAY_CHANGE = ("checkpoint.*", "log.*", "verifier.*", "optimizer.learning_rate", "optimizer.max_skipped_in_a_row")


def main(argv: list[str]) -> None:
    """From flags to the closing summary; whatever the user can mend ends in a message that starts "error:"."""
    if argv[1:]:
        raise SystemExit(
            f"error: unexpected {argv[1]!r}; write --name=value, and --config=FILE.py for the experiment."
        )
    config = config_files.checked(config_files.CONFIG.value)
    try:
        config = config_files.settled(config, config_flags.get_override_values(flags.FLAGS["config"]))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    config_files.prepare_host()
    if config.model.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    import jax

    from rl_reason import build, cache, processes, train
    from rl_reason.checkpoint import CheckpointError
    from rl_reason.compilation import CompileClock
    from rl_reason.data.stream import ExampleError
    from rl_reason.interrupts import Interrupts
    from rl_reason.models.hf_config import WeightsError
    from rl_reason.pair_data import PairError
    from rl_reason.report.console import Display
    from rl_reason.report.rundir import RunError, open_run
    from rl_reason.verifier_pool import VerifierPool

    if _DISTRIBUTED.value:
        try:
            processes.join()
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
    jax.config.update("jax_compilation_cache_dir", str(cache.cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    clock = CompileClock()
    first = processes.is_first()
    display = Display(enabled=first)
    try:
        experiment = build.build(config)
        run = run_path(config_files.name_of(config_files.resolved(sys.argv)), first, open_run, processes, config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    interrupts = Interrupts(display.warn)
    display.info(f"{run.path}: {experiment.describe()}")
    workers = config.verifier.num_workers
    with VerifierPool(workers, config.verifier.deadline_s) as pool:
        session = train.Session(experiment, run, display, pool, clock, interrupts)
        try:
            train.train(session)
        except train.StoppedError as stopped:
            display.warn(str(stopped))
            sys.exit(int(stopped.failed))
        except (RunError, CheckpointError, ExampleError, PairError, WeightsError) as error:
            raise SystemExit(f"error: {error}") from error


def run_path(config_name, first, open_run, processes, config):
    """Opens the run directory on the first process and tells the others which it is, or that it was refused."""
    run, refusal = None, None
    if first:
        try:
            run = open_run(
                config.to_dict(),
                config_name=config_name,
                run=_RUN.value,
                resume=_RESUME.value,
                may_change=MAY_CHANGE,
            )
        except (ValueError, OSError) as error:
            refusal = error
    told = processes.broadcast_text(str(pathlib.Path(run.path).absolute()) if run else "")
    if refusal is not None:
        raise refusal
    if not told:
        raise ValueError("the first process could not open the run directory; its own error says why.")
    return run or open_run(config.to_dict(), config_name=config_name, run=told, resume=_RESUME.value, write=False)


if __name__ == "__main__":
    app.run(main, flags_parser=config_files.parse)
