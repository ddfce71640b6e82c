"""python -m experiments.run --config=clipcov.py[:arg] [--config.key=value ...] [--run=DIR] [--resume]

Trains what a config describes and leaves everything about it in one directory.
"""

import functools
import os
import sys
import typing

from absl import app, flags
from ml_collections import config_flags

from configs.common import Config
from experiments import config_files, hosts

if typing.TYPE_CHECKING:
    from rl_reason.report.rundir import RunDir

_RUN = flags.DEFINE_string("run", None, "Directory of the run, below runs/ unless it has a slash; default: a new one.")
_RESUME = flags.DEFINE_bool("resume", False, "Go on with the run that --run names.")
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
    aftermath = hosts.Aftermath()
    with hosts.joined(hosts.asked(), {"config": config.to_dict()}, aftermath):
        train(config, aftermath)


def train(config: Config, aftermath: hosts.Aftermath) -> None:
    """The run itself, in each of its processes."""
    import jax

    from rl_reason import build, cache, processes, train
    from rl_reason.checkpoint import CheckpointError
    from rl_reason.compilation import CompileClock
    from rl_reason.data.stream import ExampleError
    from rl_reason.interrupts import Interrupts
    from rl_reason.models.hf_config import WeightsError
    from rl_reason.pair_data import PairError
    from rl_reason.report.console import Display
    from rl_reason.report.rundir import RunError
    from rl_reason.verifier_pool import VerifierPool

    jax.config.update("jax_compilation_cache_dir", str(cache.cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    clock = CompileClock()
    display = Display(enabled=processes.is_first())
    try:
        experiment = build.build(config)
        aftermath.run = run = open_together(config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if processes.blind_to(cache.cache_root()):
        display.warn(
            f"not all hosts share {cache.cache_root()}: what it would hold is made anew in every run; "
            "RL_REASON_CACHE=DIR says where they do."
        )
    interrupts = Interrupts(display.warn)
    display.info(f"{run.path}: {experiment.describe()}")
    with VerifierPool(config.verifier.num_workers, config.verifier.deadline_s) as pool:
        session = train.Session(experiment, run, display, pool, clock, interrupts)
        try:
            train.train(session)
        except train.StoppedError as stopped:
            display.warn(str(stopped))
            sys.exit(int(stopped.failed))
        except (RunError, CheckpointError, ExampleError, PairError, WeightsError) as error:
            raise SystemExit(f"error: {error}") from error


def open_together(config: Config) -> "RunDir":
    """Opens the run directory in the first process and tells the others which it is.

    Raises:
        ValueError, OSError: it was refused, or some process does not see it.
    """
    from rl_reason import processes
    from rl_reason.report.rundir import RunError, open_run

    name = config_files.name_of(config_files.resolved(sys.argv))
    opened = functools.partial(open_run, config.to_dict(), config_name=name, resume=_RESUME.value)
    if processes.is_first():
        run = opened(run=_RUN.value, may_change=MAY_CHANGE)
        processes.broadcast_text(str(run.path.absolute()))
    else:
        run = opened(run=processes.broadcast_text(""), write=False)
    if blind := processes.blind_to(run.path):
        raise RunError(
            f"the processes {blind} do not see what process 0 writes into {run.path}: name a directory by --run=DIR, with a "
            "slash, that is on storage that all hosts share."
        )
    return run


if __name__ == "__main__":
    app.run(main, flags_parser=config_files.parse)
