"""A whole run: warm-up, evaluation, RL in compiled chunks, evaluation, report. Resumable at every chunk boundary."""

import dataclasses
import json
import pathlib

import jax
from jaxtyping import PyTree

from rl_reason import bases, build, cache, judges, pair_data, processes, subjects, warmup
from rl_reason.checkpoint import Checkpoints
from rl_reason.compilation import CompileClock, Stopwatch
from rl_reason.drivers.base import Driver
from rl_reason.drivers.cohort import Cohort
from rl_reason.drivers.preference import Preference
from rl_reason.drivers.reinforcement import Reinforcement
from rl_reason.drivers.supervised import Supervised
from rl_reason.interrupts import Interrupts
from rl_reason.loop.engine import Advanced
from rl_reason.models.hf_config import first_of
from rl_reason.report.closing import print_summary
from rl_reason.report.console import Display
from rl_reason.report.files import to_json, write_atomic
from rl_reason.report.html import write_report
from rl_reason.report.metrics import MetricsWriter
from rl_reason.report.rollouts import RolloutWriter
from rl_reason.report.rundir import RunDir
from rl_reason.report.summary import Summary
from rl_reason.verifier_pool import VerifierPool


class StoppedError(Exception):
    """The run stopped early with its state saved; the message says why and how to go on."""

    def __init__(self, message: str, *, failed: bool = False):
        super().__init__(message)
        self.failed = failed  # by itself, not because it was asked to


@dataclasses.dataclass
class Session:
    """What one process holds while it works on a run."""

    experiment: build.Experiment
    run: RunDir
    display: Display
    pool: VerifierPool
    clock: CompileClock
    interrupts: Interrupts
    watch: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    earlier_seconds: float = 0.0  # of the runs that this one resumes
    warmup_seconds: float = 0.0

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + self.watch()


def train(session: Session) -> Summary | None:
    """Runs or resumes everything the config asks for; None on processes that do not write.

    Raises:
        StoppedError: after a signal, or too many updates in a row with a non-finite gradient; the state is saved.
    """
    experiment, run = session.experiment, session.run
    e = experiment.config.evaluation
    checkpoints = Checkpoints(run.checkpoints, keep=experiment.config.checkpoint.keep)
    saved = checkpoints.latest() if run.resumed else None
    with jax.set_mesh(experiment.mesh):
        evaluator = subjects.Evaluator(experiment, session.pool) if e.num_prompts else None
        policies = subjects.policies_of(experiment)
        if saved is None:
            params = subjects.joined(experiment, {n: _warm_up(session, own, n) for n, own in policies.items()})
            if experiment.parts.lora is not None:
                bases.keep(run.checkpoints, params, {n: warmup.unchanged(own) for n, own in policies.items()})
            trained = _make_judges(session)
            before = _evaluate(session, evaluator, params, "before")
            _stop_if_asked(session, "before the first RL step")
        else:
            # Where no adapters learn only a template, as are the judges: the checkpoint fills both.
            if experiment.parts.lora is None:
                begun = {name: build.init_params(own) for name, own in policies.items()}
            else:
                begun = {name: _base(run.checkpoints, own, name) for name, own in policies.items()}
            params = subjects.joined(experiment, begun)
            trained = {}
            before = _read_before(session)
        driver = make_driver(session, params if saved is None else None)
        state = driver.initial_state(params)
        if trained:
            state = judges.put(state, trained)
        del params
        state = Training(session, driver, checkpoints, evaluator).run(state, saved)
        after = _evaluate(session, evaluator, driver.policy(state), "after")
    checkpoints.close()
    return _finish(session, before, after) if processes.is_first() else None


def _warm_up(session: Session, experiment: build.Experiment, name: str = "") -> PyTree:
    """The weights of the policy, or of a model whose name its phase and its metrics then bear."""
    total = warmup.total_steps(experiment)
    if not session.warmup_seconds:
        session.display.info(f"caches in {cache.cache_root()}")
    title, metrics_name = (f"warm-up of {name}", f"warmup_{name}") if name else ("warm-up", "warmup")
    params = _initial(session, experiment, name)
    with session.display.phase(title, total) as phase, MetricsWriterOrNone(session, metrics_name) as writer:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            phase.update(step, {"loss": metrics["loss"]})
            if writer is not None:
                writer.append([{"step": step} | {k: v for k, v in metrics.items() if "/" in k}])
            _stop_if_asked(session, f"at warm-up step {step} of {total}")

        warm = warmup.warm_up(experiment, params, on_step)
        if warm.cached:
            phase.update(total)
    if warm.cached:
        session.display.info(f"{title} weights read from the cache in {warm.seconds:.1f} s")
    session.warmup_seconds += warm.seconds
    return warm.params


def _initial(session: Session, experiment: build.Experiment, name: str) -> PyTree:
    """Random parameters, or a checkpoint's, with a word about what else it holds."""
    folder = experiment.config.weights
    if not folder:
        return warmup.initial(experiment).params
    with session.display.phase(f"weights of {name}" if name else "weights", unit="tensor") as phase:
        loaded = warmup.initial(experiment, phase.count)
    for what, names in (("left in place", loaded.towers), ("not used", loaded.unused)):
        if names:
            session.display.info(f"{folder}: {len(names)} tensors {what}: {first_of(names)}")
    return loaded.params


def _base(directory: pathlib.Path, experiment: build.Experiment, name: str) -> PyTree:
    """What the adapters of a run were put beside when it began."""
    model = experiment.parts.model
    return bases.read(directory, name, model, build.placed_shapes(model, None, experiment.mesh))


def _make_judges(session: Session) -> dict[str, judges.Trained]:
    made: dict[str, judges.Trained] = {}
    for name in sorted(session.experiment.parts.judges):
        with session.display.phase(name, session.experiment.config.models[name]["num_steps"]) as phase:

            def on_step(step: int, loss: float, name=name, phase=phase) -> None:
                phase.update(step, {"loss": loss})
                _stop_if_asked(session, f"at step {step} of the model {name!r}")

            made[name] = judge = judges.make(session.experiment, name, on_step)
        session.display.info(
            f"{name}: {judge.accuracy:.1%} of {judges.NUM_HELDOUT} held-out cases judged as the tasks do, "
            f"{judge.unreadable:.1%} unreadable ({judge.seconds:.0f} s{', cached' if judge.cached else ''})"
        )
    return made


def _stop_if_asked(session: Session, where: str) -> None:
    """Before the first checkpoint a signal stops the run with nothing but finished warm-ups kept."""
    if processes.any_process(bool(session.interrupts.requested)):
        again = f"begin again with --run={session.run.path} --resume"
        raise StoppedError(f"stopped {where}, when there was nothing to save yet; {again}.")


class MetricsWriterOrNone:
    """A MetricsWriter on the first process, None on the others."""

    def __init__(self, session: Session, name: str = "metrics"):
        self.writer = MetricsWriter(session.run.path, name) if processes.is_first() else None
        if self.writer is not None and session.run.resumed:
            self.writer.truncate(rows=0)

    def __enter__(self) -> MetricsWriter | None:
        return self.writer

    def __exit__(self, *_) -> None:
        if self.writer is not None:
            self.writer.close()


def _evaluate(session: Session, evaluator, params: PyTree, when: str) -> subjects.Answers:
    if evaluator is None:
        return {}
    with session.display.phase(f"evaluate {when}"):
        answered = evaluator(params, session.experiment.sampling)
    if processes.is_first():
        record = subjects.to_record(answered) | {"warmup_seconds": session.warmup_seconds}
        write_atomic(session.run.path / f"evaluation_{when}.json", to_json(record) + "\n")
    return answered


def _read_before(session: Session) -> subjects.Answers:
    if not processes.is_first() or not session.experiment.config.evaluation.num_prompts:
        return {}
    record = json.loads((session.run.path / "evaluation_before.json").read_text())
    session.warmup_seconds = record["warmup_seconds"]
    return subjects.from_record(record, session.experiment.heldout)


class Training:
    """The phase that the config is about: chunks of a loop, their records, and checkpoints that agree with the records."""

    def __init__(
        self, session: Session, driver: Driver, checkpoints: Checkpoints, evaluator: subjects.Evaluator | None
    ):
        self.session, self.driver, self.checkpoints, self.evaluator = session, driver, checkpoints, evaluator
        self.experiment = session.experiment
        self.writer = self.rollouts = None
        if processes.is_first():
            self.writer, self.rollouts = MetricsWriter(session.run.path), RolloutWriter(session.run.rollouts)

    def run(self, state: PyTree, saved: int | None) -> PyTree:
        """From step 0 or a checkpoint to the config's last step."""
        config, session = self.experiment.config, self.session
        state, step = self._start(state, saved), saved or 0
        with session.display.phase(self.driver.phase, config.num_steps, start=step) as phase:
            while step < config.num_steps:
                out = self.driver.advance(state)
                state, step = out.state, step + config.steps_per_call
                rows = self._record(out, step)
                phase.update(step, {name: x for name, x in rows[-1].items() if "/" in name})
                if config.evaluation.every and step % config.evaluation.every == 0 and self.evaluator:
                    self._validate(state, step)
                session.clock.watch(self.driver.programs, session.display.warn)
                self._save_or_stop(state, step)
        session.clock.watch((), session.display.warn)
        if self.writer is not None:
            self.writer.close()
        return state

    def _start(self, state: PyTree, saved: int | None) -> PyTree:
        if saved is None:
            if self.session.run.resumed and self.writer is not None and self.rollouts is not None:
                self.writer.truncate(rows=0)  # killed before its first checkpoint: everything is done again
                self.rollouts.truncate(0)
            self.driver.prime(state)
            return state
        extra = self.checkpoints.extra(saved)
        self.driver.seek(extra["stream"])
        self.driver.prime(state)
        self.driver.seek(extra["stream"])
        like = (self.driver.kept(state), self.driver.pending)
        kept, self.driver.pending = self.checkpoints.restore(saved, like)
        state = self.driver.around_base(kept, state)
        self.session.earlier_seconds = extra["wall_seconds"]
        if self.writer is not None and self.rollouts is not None:
            self.writer.truncate(rows=extra["metric_rows"])
            self.rollouts.truncate(saved)
        self.session.display.info(f"resumed at step {saved} of {self.experiment.config.num_steps}")
        return state

    def _record(self, out: Advanced, step: int) -> list[dict[str, float]]:
        count = len(out.metrics["training/global_step"])
        rows = []
        for k in range(count):
            row = {name: float(x[k]) for name, x in out.metrics.items()}
            row |= {f"timing_s/{name}": seconds for name, seconds in out.timing.items()}
            row["perf/throughput"] = row["perf/total_num_tokens"] / max(out.timing["step"], 1e-9)
            rows.append({"step": step - count + k + 1} | row)
        if self.writer is not None and self.rollouts is not None:
            self.writer.append(rows)
            for k in range(count):
                if records := list(self.driver.records(out, k)):
                    self.rollouts.write(rows[k]["step"], records)
        if complaint := self.driver.complaint(rows[-1]):
            self.session.display.warn(complaint)
        return rows

    def _validate(self, state: PyTree, step: int) -> None:
        assert self.evaluator is not None
        answered = self.evaluator(self.driver.policy(state), self.experiment.sampling)
        if self.writer is not None:
            self.writer.append([{"step": step} | subjects.metrics(answered)])

    def _save_or_stop(self, state: PyTree, step: int) -> None:
        config = self.experiment.config
        signalled = self.session.interrupts.requested
        stop = processes.any_process(bool(signalled))
        skipped = self.driver.skipped_in_a_row(state)
        broken = skipped >= config.optimizer.max_skipped_in_a_row
        every = config.checkpoint.every
        if not (stop or broken or step == config.num_steps or (every and step % every == 0)):
            return
        metric_rows = self.writer.sync() if self.writer is not None else 0
        extra = dict(
            stream=self.driver.position(), metric_rows=metric_rows, wall_seconds=self.session.wall_seconds, step=step
        )
        self.checkpoints.save(step, (self.driver.kept(state), self.driver.pending), extra)
        again = f"go on with --run={self.session.run.path} --resume"
        if broken:
            raise StoppedError(
                f"{skipped} updates in a row had a non-finite loss or gradient; stopped at step {step} with the last "
                f"good weights saved. Lower config.optimizer.learning_rate, then {again}.",
                failed=True,
            )
        if stop and step < config.num_steps:
            raise StoppedError(f"stopped at step {step} of {config.num_steps}, saved; {again}.")


def make_driver(session: Session, params: PyTree | None) -> Driver:
    """The driver of the loop that ``config.loop`` names; ``params`` is the warmed-up policy, None on resume."""
    if session.experiment.config.loop == "supervised":
        return Supervised(session.experiment)
    if session.experiment.config.loop == "preference":
        return _preference(session, params)
    if session.experiment.config.loop == "cohort":
        return Cohort(session.experiment, session.pool)
    return Reinforcement(session.experiment, session.pool)


def _preference(session: Session, params: PyTree | None) -> Preference:
    """The driver around its pairs, which are noted in the run's directory."""

    def warm(author: build.Experiment, name: str) -> PyTree:
        if author is session.experiment and params is not None:
            return params
        return _warm_up(session, author, name)

    made = pair_data.make(
        session.experiment, session.display, warm, lambda where: _stop_if_asked(session, f"{where}, before pairs")
    )
    if processes.is_first():
        pair_data.write(session.run.path, made)
    with MetricsWriterOrNone(session, "pair_statistics") as writer:
        if writer is not None:
            writer.append([{"step": 0} | made.statistics])
    shown = ("pairs/num", "pairs/available", "pairs/keep_rate", "pairs/flipped_fraction", "pairs/heldout")
    told = [f"{name.removeprefix('pairs/')} {made.statistics[name]:.4g}" for name in shown if name in made.statistics]
    session.display.info(f"pairs: {', '.join(told)}; they are in {session.run.path / 'pairs.jsonl'}")
    return Preference(session.experiment, made.train, made.heldout)


def _finish(session: Session, before: subjects.Answers, after: subjects.Answers) -> Summary:
    """Summary, report and the closing words."""
    seconds = {"wall": session.wall_seconds, "warm-up": session.warmup_seconds, "compile": session.clock.seconds}
    summary = subjects.summary_of(before, after, seconds)
    summary.save(session.run.summary)
    try:
        if session.experiment.config.log.report:
            write_report(session.run.path)
    except Exception as error:  # a plot must not fail a finished run
        session.display.warn(f"no report: {error!r}. Try `python -m experiments.report --run={session.run.path}`.")
    print_summary(session.display, session.run.name, summary, session.run.written())
    return summary
