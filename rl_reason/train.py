"""A whole run: warm-up, evaluation, RL in compiled chunks, evaluation, report. Resumable at every chunk boundary."""

import dataclasses
import json
import typing
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import PyTree

from rl_reason import build, evaluate, processes, rewards, warmup
from rl_reason.checkpoint import Checkpoints
from rl_reason.compilation import CompileClock, Stopwatch
from rl_reason.data.stream import prompt_stream
from rl_reason.interrupts import Interrupts
from rl_reason.loop.engine import Advanced, Engine, Fused, Split
from rl_reason.loop.step import Sampled
from rl_reason.report.closing import print_summary
from rl_reason.report.console import Display
from rl_reason.report.files import to_json, write_atomic
from rl_reason.report.html import write_report
from rl_reason.report.metrics import MetricsWriter
from rl_reason.report.rollouts import RolloutWriter
from rl_reason.report.rundir import RunDir
from rl_reason.report.summary import Answer, Summary, Transcript, summarise
from rl_reason.types import Prompts, TrainState
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
        evaluator = None
        if e.num_prompts:
            evaluator = evaluate.Evaluator(
                experiment, experiment.heldout, session.pool, **{k: v for k, v in e.items() if k != "every"}
            )
        if saved is None:
            params = _warm_up(session)
            before = _evaluate(session, evaluator, params, "before")
            _stop_if_asked(session, "before the first RL step")
        else:
            params = build.init_params(experiment)  # only a template: the checkpoint fills it
            before = _read_before(session)
        state = build.init_state(experiment, experiment.parts, params)
        del params
        state = Reinforcement(session, checkpoints, evaluator).run(state, saved)
        after = _evaluate(session, evaluator, state.params, "after")
    checkpoints.close()
    return _finish(session, before, after) if processes.is_first() else None


def _warm_up(session: Session) -> PyTree:
    w = session.experiment.config.warmup
    session.display.info(f"caches in {warmup.cache_root()}")
    with session.display.phase("warm-up", w.num_steps) as phase, MetricsWriterOrNone(session, "warmup") as writer:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            phase.update(step, {"loss": metrics["loss"]})
            if writer is not None:
                writer.append([{"step": step} | {k: v for k, v in metrics.items() if "/" in k}])
            _stop_if_asked(session, f"at warm-up step {step} of {w.num_steps}")

        warm = warmup.warm_up(session.experiment, on_step)
        if warm.cached:
            phase.update(w.num_steps)
    if warm.cached:
        session.display.info(f"warm-up weights read from the cache in {warm.seconds:.1f} s")
    session.warmup_seconds = warm.seconds
    return warm.params


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


def _evaluate(session: Session, evaluator, params: PyTree, when: str) -> list[evaluate.Answered]:
    if evaluator is None:
        return []
    with session.display.phase(f"evaluate {when}"):
        answered = evaluator(params, session.experiment.sampling)
    if processes.is_first():
        record = {"answers": [evaluate.to_record(a) for a in answered], "warmup_seconds": session.warmup_seconds}
        write_atomic(session.run.path / f"evaluation_{when}.json", to_json(record) + "\n")
    return answered


def _read_before(session: Session) -> list[evaluate.Answered]:
    if not processes.is_first() or not session.experiment.config.evaluation.num_prompts:
        return []
    record = json.loads((session.run.path / "evaluation_before.json").read_text())
    session.warmup_seconds = record["warmup_seconds"]
    return [evaluate.from_record(r, session.experiment.heldout, i) for i, r in enumerate(record["answers"])]


class Reinforcement:
    """The RL phase: chunks of steps, their records, and checkpoints that agree with the records."""

    def __init__(self, session: Session, checkpoints: Checkpoints, evaluator: evaluate.Evaluator | None):
        self.session, self.checkpoints, self.evaluator = session, checkpoints, evaluator
        self.experiment = session.experiment
        config, plan = self.experiment.config, self.experiment.parts.plan
        self.host_verifier = rewards.HostVerifier(self.experiment.train, self.experiment.tokenizer, session.pool)
        self.engine: Engine = make_engine(self.experiment, self.host_verifier)
        self.rows = build.rows_sharding(self.experiment.mesh)
        self.stream = prompt_stream(
            self.experiment.train,
            self.experiment.tokenizer,
            batch_size=plan.prompts_drawn,
            prompt_len=config.data.max_prompt_len_tokens,
            reference_len=config.data.max_reference_len_tokens if config.verify == "graph" else None,
            rows=processes.local_rows(self.rows, plan.prompts_drawn),
        )
        self.writer = self.rollouts = None
        if processes.is_first():
            self.writer, self.rollouts = MetricsWriter(session.run.path), RolloutWriter(session.run.rollouts)

    def run(self, state: TrainState, saved: int | None) -> TrainState:
        """From step 0 or a checkpoint to the config's last step."""
        config, session = self.experiment.config, self.session
        sampling = self.experiment.sampling
        state = self._start(state, saved)
        step = int(state.step)
        with session.display.phase("rl", config.num_steps, start=step) as phase:
            while step < config.num_steps:
                prompts = self._next_prompts(config.steps_per_call)
                out = self.engine.advance(state, prompts, sampling)
                state, step = out.state, step + config.steps_per_call
                rows = self._record(out, step)
                phase.update(step, {name: x for name, x in rows[-1].items() if "/" in name})
                if config.evaluation.every and step % config.evaluation.every == 0 and self.evaluator:
                    self._validate(state, step)
                session.clock.watch(self.engine.programs, session.display.warn)
                self._save_or_stop(state, step)
        session.clock.watch((), session.display.warn)
        if self.writer is not None:
            self.writer.close()
        return state

    def _start(self, state: TrainState, saved: int | None) -> TrainState:
        if saved is None:
            if self.session.run.resumed and self.writer is not None and self.rollouts is not None:
                self.writer.truncate(rows=0)  # killed before its first checkpoint: everything is done again
                self.rollouts.truncate(0)
            if isinstance(self.engine, Split) and self.engine.draws_ahead:
                self.engine.prime(state, self._to_device(next(self.stream)), self.experiment.sampling)
            return state
        extra = self.checkpoints.extra(saved)
        self.stream.set_state(extra["stream"])
        if isinstance(self.engine, Split) and self.engine.draws_ahead:
            # Gives the shapes of a rollout in flight; the checkpoint fills them.
            template = self._to_device(next(iter_from(self.stream, extra["stream"])))
            self.engine.prime(state, template, self.experiment.sampling)
        state, self.engine.pending = self.checkpoints.restore(saved, (state, self.engine.pending))
        self.session.earlier_seconds = extra["wall_seconds"]
        if self.writer is not None and self.rollouts is not None:
            self.writer.truncate(rows=extra["metric_rows"])
            self.rollouts.truncate(saved)
        self.session.display.info(f"resumed at step {saved} of {self.experiment.config.num_steps}")
        return state

    def _next_prompts(self, count: int) -> Prompts:
        drawn = [next(self.stream) for _ in range(count)]
        stacked = jax.tree.map(lambda *x: np.stack(x), *drawn)
        return processes.to_global(stacked, build.rows_sharding(self.experiment.mesh, leading=1))

    def _to_device(self, prompts: Prompts) -> Prompts:
        return processes.to_global(prompts, self.rows)

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
                sampled = jax.tree.map(lambda x, k=k: x[k], out.sampled)
                self.rollouts.write(rows[k]["step"], rollout_records(self.experiment, sampled))
        if rows[-1]["reward/error_fraction"] > 0 and self.host_verifier.last_error:
            self.session.display.warn(f"a verifier failed: {self.host_verifier.last_error}")
        return rows

    def _validate(self, state: TrainState, step: int) -> None:
        assert self.evaluator is not None
        answered = self.evaluator(state.params, self.experiment.sampling)
        if self.writer is not None:
            self.writer.append([{"step": step} | dict(evaluate.metrics(answered))])

    def _save_or_stop(self, state: TrainState, step: int) -> None:
        config = self.experiment.config
        signalled = self.session.interrupts.requested
        stop = processes.any_process(bool(signalled))
        skipped = int(state.stats["skipped_in_a_row"])
        broken = skipped >= config.optimizer.max_skipped_in_a_row
        every = config.checkpoint.every
        if not (stop or broken or step == config.num_steps or (every and step % every == 0)):
            return
        metric_rows = self.writer.sync() if self.writer is not None else 0
        extra = dict(
            stream=self.stream.get_state(), metric_rows=metric_rows, wall_seconds=self.session.wall_seconds, step=step
        )
        self.checkpoints.save(step, (state, self.engine.pending), extra)
        again = f"go on with --run={self.session.run.path} --resume"
        if broken:
            raise StoppedError(
                f"{skipped} updates in a row had a non-finite loss or gradient; stopped at step {step} with the last "
                f"good weights saved. Lower config.optimizer.learning_rate, then {again}.",
                failed=True,
            )
        if stop and step < config.num_steps:
            raise StoppedError(f"stopped at step {step} of {config.num_steps}, saved; {again}.")


def iter_from(stream, state):
    """A second look at the stream's next batch, leaving the stream where it was."""
    batch = next(stream)
    stream.set_state(state)
    return iter([batch])


def make_engine(experiment: build.Experiment, host_verifier: rewards.HostVerifier) -> Engine:
    """The composition that ``config.verify`` names."""
    parts, plan, mode = experiment.parts, experiment.parts.plan, experiment.config.verify
    if mode == "graph":
        verify = rewards.in_graph(
            experiment.train.names,
            experiment.tokenizer,
            group_size=plan.group_size,
            completion_len=parts.rollout.completion_len,
        )
        return Fused(parts, verify)
    if mode == "callback":
        width = experiment.config.data.max_prompt_len_tokens + parts.rollout.completion_len
        rewards.check_callback_threads(plan.generated_prompts * plan.group_size * width * 5, experiment.mesh)
        return Fused(parts, rewards.by_callback(host_verifier, experiment.mesh, group_size=plan.group_size))
    return Split(parts, host_verifier, experiment.mesh, overlap=mode == "overlapped")


def rollout_records(experiment: build.Experiment, sampled: Sampled) -> Iterator[dict[str, typing.Any]]:
    """verl's rollout fields, from a step's samples."""
    group_size = experiment.parts.plan.group_size
    for row in range(len(sampled.uid)):
        uid = int(sampled.uid[row])
        example = experiment.train.example(uid)
        mask = sampled.completion_mask[row]
        ids = sampled.tokens[row][mask]
        yield {
            "input": example.prompt,
            "output": experiment.tokenizer.decode(ids),
            "gts": example.reference,
            "score": float(sampled.reward[row]) if sampled.valid[row] else None,
            "correct": bool(sampled.correct[row]),
            "data_source": example.source,
            "group_id": uid,
            "sample_id": row % group_size,
            "finish_reason": "length" if sampled.truncated[row] else "stop",
            "token_ids": [int(i) for i in ids],
            "logprobs": [float(x) for x in sampled.rollout_logprobs[row][mask]],
        }


def _finish(session: Session, before: list[evaluate.Answered], after: list[evaluate.Answered]) -> Summary:
    """Summary, report and the closing words."""
    seconds = {"wall": session.wall_seconds, "warm-up": session.warmup_seconds, "compile": session.clock.seconds}
    summary = summarise(
        evaluate.by_task(before), evaluate.by_task(after), seconds=seconds, transcripts=_transcripts(before, after)
    )
    summary.save(session.run.summary)
    try:
        if session.experiment.config.log.report:
            write_report(session.run.path)
    except Exception as error:  # a plot must not fail a finished run
        session.display.warn(f"no report: {error!r}. Try `python -m experiments.report --run={session.run.path}`.")
    print_summary(session.display, session.run.name, summary, session.run.written())
    return summary


def _transcripts(before: list[evaluate.Answered], after: list[evaluate.Answered]) -> list[Transcript]:
    """The first sample of three prompts of different tasks where there are as many, before and after."""
    chosen: dict[str, int] = {}
    for number, answered in enumerate(before):
        chosen.setdefault(answered.example.source, number)
    numbers = (list(chosen.values()) + [n for n in range(len(before)) if n not in chosen.values()])[:3]

    def answer(answered: evaluate.Answered) -> Answer:
        verdict = answered.correct[0]
        return Answer(answered.completions[0], None if np.isnan(verdict) else bool(verdict))

    return [
        Transcript(
            prompt=before[n].example.prompt,
            before=answer(before[n]),
            after=answer(after[n]),
            task=before[n].example.source,
            gts=before[n].example.reference or "",
        )
        for n in numbers
    ]
