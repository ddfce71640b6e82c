"""python -m experiments.evaluate --run=runs/NAME [--num_samples=16] [--tasks=a,b | --prompts=FILE.jsonl] [...]

How good a run's policy is: pass@1, pass@k and maj@k with 95% bootstrap intervals, by task and level. Samples from the
run's held-out problems, from other tasks' held-out problems, or from the prompts of a file, and writes
evaluation-<step>[-name].json and completions-<step>[-name].jsonl into the run's directory.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
import time
import typing
from collections.abc import Mapping, Sequence

import ml_collections
from absl import logging

from configs import base
from configs.common import Config
from experiments import config_files, hosts
from experiments.evaluation_prompts import UNVERIFIED, source_of
from rl_reason.report.rundir import RunError, flatten, load_config

if typing.TYPE_CHECKING:
    from rl_reason.evaluate import Answered
    from rl_reason.report.console import Display

DEFAULT_PROMPTS = 256  # of tasks; a file is read whole
# Sections whose keys are a function's own hyperparameters, or that sampling does not read.
NOT_READ = ("reward", "selection", "advantages", "correction", "objective", "aggregation", "regularisers")
READ = ("seed", "model", "tokenizer", "mesh", "data", "rollout", "lora", "evaluation", "verifier")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a run's directory, or its name below runs/")
    add("--step", type=int, help="the checkpoint's step (default: the newest)")
    add("--policy", help="of a cohort: which of its policies")
    add("--num_samples", type=int, default=16, help="completions a prompt (default 16)")
    add("--num_prompts", type=int, help=f"prompts (default {DEFAULT_PROMPTS}; of a file: all)")
    add("--tasks", help="tasks to evaluate on instead of the run's data, separated by commas; all their levels")
    add("--levels", help="with --tasks: only these levels, separated by commas")
    add("--prompts", metavar="FILE", help=".jsonl or .parquet of prompts, with the columns of the run's config.data")
    add("--verifier", help="with --prompts: a task, 'module:compute_score', or 'none' to write completions only")
    add("--answer_key", help="with --prompts: the column of the answer, or 'none' (default: the run's)")
    add("--temperature", type=float, help="default: the run's; 0 is greedy")
    add("--top_k", type=int, help="default: the run's")
    add("--top_p", type=float, help="default: the run's")
    add("--min_p", type=float, help="default: the run's")
    add("--completion_len", type=int, help="tokens, EOS included (default: the run's)")
    add("--num_slots", type=int, help="rows decoded at a time (default: the run's evaluation.num_slots)")
    add("--prompts_per_call", type=int, default=128, help="prompts sampled by one call: bounds memory (default 128)")
    add("--seed", type=int, default=0, help="of the samples; the prompts are the run's (default 0)")
    add("--name", help="names the files written (default: after --tasks or --prompts)")
    add(
        "--distributed",
        action="store_true",
        help="join other processes, as experiments.run does without --coordinator",
    )
    args = parser.parse_args(argv)
    for name in ("num_samples", "num_prompts", "completion_len", "num_slots", "prompts_per_call"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value}: want at least 1.")
    if args.tasks and args.prompts:
        parser.error("--tasks and --prompts are two sources; give one.")
    if args.levels and not args.tasks:
        parser.error("--levels goes with --tasks.")
    if (args.verifier or args.answer_key) and not args.prompts:
        parser.error("--verifier and --answer_key go with --prompts; tasks verify themselves.")
    return args


def config_of(run: pathlib.Path) -> Config:
    """The config of a run, as the code of today wants it.

    Raises:
        RunError: no run there, or one whose config lacks keys that sampling reads.
    """
    config = load_config(run)
    wanted = flatten({key: value for key, value in base.get_config().to_dict().items() if key in READ})
    found = flatten({key: value for key, value in config.items() if key in READ})
    missing = [key for key in wanted if key not in found and not any(k.startswith(f"{key}.") for k in found)]
    if missing:
        values = ", ".join(f"{key} (now {wanted[key]!r})" for key in missing)
        raise RunError(
            f"{run / 'config.json'} lacks {values}: it was written by other code. Evaluate with the code that made "
            "the run, or add those keys to the file with the values that describe it."
        )
    known = ("model", "rollout")  # passed on by name: a key too many would be refused further down, less clearly
    unknown = [key for key in found if key.startswith(tuple(f"{k}." for k in known)) and key not in wanted]
    if unknown:
        raise RunError(
            f"{run / 'config.json'} has {', '.join(unknown)}, which this code does not know: it was written by other "
            "code. Evaluate with the code that made the run."
        )
    # Infinities are kept as text in config.json.
    return ml_collections.ConfigDict(_numbers({key: value for key, value in config.items() if key not in NOT_READ}))


def _numbers(value: typing.Any) -> typing.Any:
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value


def policy_of(config: Config, name: str | None) -> Config:
    """The config with the model of the policy that is asked for.

    Raises:
        ValueError: a cohort without a choice, or a choice that is not there.
    """
    policies = config.get("cohort", {})
    if name is None and policies:
        raise ValueError(f"the run trained a cohort; say which policy: --policy={' or --policy='.join(policies)}.")
    if name is not None and name not in policies:
        there = f"its policies are {', '.join(policies)}" if policies else "it trained one policy: leave --policy out"
        raise ValueError(f"--policy={name}: the run has none of that name; {there}.")
    if name is not None:
        config.model.update(policies[name].get("model", {}))
    return config


def with_args(config: Config, args: argparse.Namespace) -> Config:
    """The config with the sampling that the flags ask for."""
    for name in ("temperature", "top_k", "top_p", "min_p", "completion_len"):
        if getattr(args, name) is not None:
            config.rollout[name] = getattr(args, name)
    if args.num_slots is not None:
        config.evaluation.num_slots = args.num_slots
    return config


def fit_mesh(config: Config, display: "Display") -> None:
    """Cuts prompts over all devices here where the run's mesh does not cover them."""
    import jax

    from rl_reason import sharding

    try:
        sharding.make_mesh(config.mesh.to_dict())
    except ValueError:
        config.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1)
        display.info(f"the run's mesh does not cover {jax.device_count()} devices; using data={jax.device_count()}")


@dataclasses.dataclass
class Evaluation:
    """What was asked and what came of it."""

    run: pathlib.Path
    step: int
    name: str
    sampling: dict[str, float]
    completion_len: int
    seed: int
    seconds: float
    verified: bool
    answered: list["Answered"]

    def path(self, what: str, suffix: str) -> pathlib.Path:
        return self.run / f"{what}-{self.step}{f'-{self.name}' if self.name else ''}{suffix}"

    def record(self) -> dict[str, typing.Any]:
        """The JSON that is written."""
        from rl_reason import evaluate

        tokens = sum(sum(a.num_tokens) for a in self.answered)
        return dict(
            run=str(self.run),
            step=self.step,
            name=self.name,
            num_prompts=len(self.answered),
            num_samples=len(self.answered[0].correct),
            sampling=self.sampling,
            completion_len=self.completion_len,
            seed=self.seed,
            verified=self.verified,
            tokens=tokens,
            seconds=self.seconds,
            groups=evaluate.table(self.answered) if self.verified else {},
        )

    def completions(self) -> typing.Iterator[dict[str, typing.Any]]:
        """One row a sample, in verl's names."""
        for number, a in enumerate(self.answered):
            for sample, text in enumerate(a.completions):
                yield dict(
                    input=a.example.prompt,
                    output=text,
                    gts=a.example.reference,
                    score=None if math.isnan(a.correct[sample]) else a.correct[sample],
                    answer=a.answers[sample],
                    data_source=a.example.source,
                    level=a.example.problem.level,
                    group_id=number,
                    sample_id=sample,
                    num_tokens=a.num_tokens[sample],
                    finish_reason="length" if a.truncated[sample] else "stop",
                )


def evaluate_run(args: argparse.Namespace, run: pathlib.Path, display: "Display") -> Evaluation:
    """Restores, samples and verifies."""
    import jax

    from rl_reason import evaluate
    from rl_reason.sampling import make_sampling
    from rl_reason.verifier_pool import VerifierPool

    config = with_args(policy_of(config_of(run), args.policy), args)
    r = config.rollout
    sampling = make_sampling(r.temperature, r.top_k, r.top_p, r.min_p)
    fit_mesh(config, display)
    setup = evaluate.setup_of(config)
    source, name = source_of(args, setup)
    there_are = source.num_examples or sys.maxsize
    count = args.num_prompts or (there_are if args.prompts else DEFAULT_PROMPTS)
    count = min(count, there_are)  # a row twice would be no second prompt
    verified = UNVERIFIED not in source.verifiers
    if r.temperature == 0 and args.num_samples > 1:
        display.warn(
            f"at temperature 0 the {args.num_samples} samples of a prompt are all the same; use --num_samples=1"
        )
    with jax.set_mesh(setup.mesh), VerifierPool(config.verifier.num_workers, config.verifier.deadline_s) as pool:
        step, params = evaluate.restore_policy(run / "checkpoints", setup, args.step, args.policy)
        display.info(
            f"{run}: step {step}, {count} prompts x {args.num_samples} samples at temperature {r.temperature:g}"
        )
        began = time.perf_counter()
        with display.phase("evaluate", count, unit="prompt") as phase:
            evaluator = evaluate.Evaluator(
                setup,
                source,
                pool if verified else None,
                num_prompts=count,
                num_samples=args.num_samples,
                num_slots=config.evaluation.num_slots,
                prompt_len=0,
                prompts_per_call=args.prompts_per_call,
            )
            answered = evaluator(params, sampling, args.seed, phase.update)
    knobs = {name: float(r[name]) for name in ("temperature", "top_k", "top_p", "min_p")}
    seconds = time.perf_counter() - began
    name = "-".join(filter(None, (args.policy, name))) if args.name is None else args.name
    return Evaluation(run, step, name, knobs, r.completion_len, args.seed, seconds, verified, answered)


def print_evaluation(display: "Display", record: Mapping[str, typing.Any], paths: Sequence[pathlib.Path]) -> None:
    """The table, what it is made of, and where it lies; 80 columns wide at most."""
    import rich.text

    from rl_reason.report.console import human

    say = display.console.print
    rows = record["num_prompts"] * record["num_samples"]
    words = [f"{rows:,} samples, {record['tokens'] / rows:.1f} tokens on average"]
    if record["groups"]:
        overall = record["groups"]["overall"]
        say(accuracy_table(display, record["groups"]))
        words.append(f"{100 * overall['truncated_fraction']:.1f}% cut at {record['completion_len']} tokens")
        if overall["error_fraction"]:
            words.append(f"{100 * overall['error_fraction']:.1f}% without a verdict: the verifier failed")
    else:
        words.append("not verified: name a --verifier for that")
    rate = record["tokens"] / max(record["seconds"], 1e-9)
    words.append(f"{record['seconds']:.1f} s, {human(rate)} tok/s with compilation")
    say(rich.text.Text("; ".join(words), "dim"))
    for path in paths:
        say(rich.text.Text(str(path)), soft_wrap=True)


def columns_of(num_samples: int, room: int) -> list[str]:
    """pass@k and maj@k for all samples, and as many k between as there is room for, the largest first.

    >>> columns_of(16, 5), columns_of(1, 5)
    (['pass@1', 'pass@4', 'pass@8', 'pass@16', 'maj@16'], ['pass@1'])
    """
    from rl_reason.evaluate import ks_of

    if num_samples == 1:
        return ["pass@1"]
    inner = ks_of(num_samples)[1:-1]
    kept = inner[max(len(inner) - (room - 3), 0) :]
    return [f"pass@{k}" for k in (1, *kept, num_samples)] + [f"maj@{num_samples}"]


def accuracy_table(display: "Display", groups: Mapping[str, Mapping[str, typing.Any]]) -> typing.Any:
    """A row a task, its levels beneath when it has several; each cell a percentage over its 95% interval."""
    import rich.box
    import rich.table
    import rich.text

    from rl_reason.report.files import visible

    names = columns_of(next(iter(groups.values()))["num_samples"], room=6)
    box = rich.box.SIMPLE_HEAD if display.unicode else rich.box.ASCII2
    out = rich.table.Table(box=box, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    out.add_column("% [95%]", overflow="fold")
    for name in ("n", *names):
        out.add_column(name, justify="right", no_wrap=True)
    tasks = [name for name in groups if "/level_" not in name and name != "overall"]
    for name, row in groups.items():
        task, _, level = name.partition("/level_")
        if level and sum(other.startswith(f"{task}/level_") for other in groups) < 2:
            continue  # its only level
        if name == "overall" and len(tasks) < 2:
            continue
        label = rich.text.Text(f"  level {level}" if level else visible(task), "" if level else "bold")
        cells = [rich.text.Text.assemble(percent(row[k]), "\n", (interval(row[k]), "dim")) for k in names]
        out.add_row(label, str(row["num_prompts"]), *cells)
    return out


def percent(estimate: Mapping[str, float]) -> str:
    """'61.2', or a dash when no prompt had a verdict."""
    return "-" if math.isnan(estimate["value"]) else f"{100 * estimate['value']:.1f}"


def interval(estimate: Mapping[str, float]) -> str:
    """'[55,67]'."""
    return "" if math.isnan(estimate["value"]) else f"[{100 * estimate['low']:.0f},{100 * estimate['high']:.0f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates, prints the table and writes the files; returns the exit status."""
    args = parse_args(argv)
    try:
        evaluate_together(args)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        return 1
    return 0


def evaluate_together(args: argparse.Namespace) -> None:
    """With all processes of the evaluation.

    Raises:
        SystemExit: whatever the user can mend.
    """
    run = pathlib.Path(args.run)
    if not run.exists() and "/" not in args.run and (pathlib.Path("runs") / run).exists():
        run = pathlib.Path("runs") / run
    config_files.prepare_host()
    logging.set_verbosity(logging.ERROR)  # Orbax also warns where all is well
    try:
        if load_config(run).get("model", {}).get("dtype") == "float64":
            os.environ["JAX_ENABLE_X64"] = "1"
    except RunError as error:
        raise SystemExit(f"error: {error}") from error
    joining = hosts.Joining() if args.distributed else None
    with hosts.joined(joining, {"flags": vars(args)}, hosts.Aftermath()):
        try:
            evaluate_and_write(args, run)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error


def evaluate_and_write(args: argparse.Namespace, run: pathlib.Path) -> None:
    """All processes evaluate together, the first one writes."""
    import jax

    from rl_reason import cache, processes
    from rl_reason.report.console import Display
    from rl_reason.report.files import to_json, write_atomic

    jax.config.update("jax_compilation_cache_dir", str(cache.cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    display = Display(enabled=processes.is_first())
    done = evaluate_run(args, run, display)
    if not processes.is_first():
        return
    record = done.record()
    paths = done.path("evaluation", ".json"), done.path("completions", ".jsonl")
    write_atomic(paths[0], to_json(record, indent=2) + "\n")
    write_atomic(paths[1], "".join(to_json(row) + "\n" for row in done.completions()))
    print_evaluation(display, record, paths)


if __name__ == "__main__":
    sys.exit(main())
