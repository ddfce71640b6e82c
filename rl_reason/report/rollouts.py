"""rollouts/<step>.jsonl: what the model wrote at a step and what it earned, in verl's fields and ours."""

import json
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence

from rl_reason.report.files import is_leftover, to_json, write_atomic

REQUIRED = ("input", "output", "gts", "score", "group_id", "sample_id", "finish_reason")


class RolloutRecord(typing.TypedDict, total=False):
    """One completion. The fields of ``REQUIRED`` are always there; not-finite numbers are null."""

    input: str  # the prompt
    output: str  # the completion
    gts: typing.Any  # ground truth; JSON
    score: float | None  # total reward; None: the verifier failed
    step: int  # set by the writer
    group_id: int  # completions of one prompt share it
    sample_id: int  # within the group
    finish_reason: str  # "stop" or "length"
    advantage: float
    policy: str  # of a cohort: who wrote it
    parts: dict[str, float]  # the reward's parts
    token_ids: list[int]  # of the completion
    logprobs: list[float]  # the sampler's, nats, one a token


class RolloutWriter:
    """Writes one file a step below ``directory``, each whole or absent."""

    def __init__(self, directory: str | pathlib.Path) -> None:
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, records: Iterable[Mapping[str, typing.Any]]) -> pathlib.Path:
        """Replaces the file of ``step``; extra fields are kept.

        Raises:
            ValueError: when a record lacks a required field, or has not one logprob a token.
        """
        lines = []
        for index, record in enumerate(records):
            missing = [field for field in REQUIRED if field not in record]
            if missing:
                raise ValueError(f"Rollout {index} of step {step} lacks {missing}; it has {sorted(record)}.")
            tokens, logprobs = record.get("token_ids"), record.get("logprobs")
            if tokens is not None and logprobs is not None and len(tokens) != len(logprobs):
                raise ValueError(f"Rollout {index} of step {step}: {len(tokens)} tokens, {len(logprobs)} logprobs.")
            lines.append(to_json({**record, "step": step}) + "\n")
        path = self.directory / f"{step}.jsonl"
        write_atomic(path, "".join(lines))
        return path

    def truncate(self, step: int) -> list[int]:
        """Removes the files of steps after ``step``, and what a kill left half-written; returns those steps."""
        for path in self.directory.iterdir():
            if is_leftover(path):
                path.unlink()
        later = [other for other in rollout_steps(self.directory) if other > step]
        for other in later:
            (self.directory / f"{other}.jsonl").unlink()
        return later


def rollout_steps(directory: str | pathlib.Path) -> list[int]:
    """The steps that have a file, ascending; none when there is no directory."""
    files = pathlib.Path(directory).glob("*.jsonl")
    return sorted(int(path.stem) for path in files if path.stem.isascii() and path.stem.isdigit())


def read_rollouts(directory: str | pathlib.Path, step: int) -> list[RolloutRecord]:
    """The records of a step.

    Raises:
        FileNotFoundError: naming the steps that have a file.
    """
    path = pathlib.Path(directory) / f"{step}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; there are steps {_brief(rollout_steps(directory))}.")
    # Not splitlines: it also splits at U+2028 and U+0085, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _brief(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) < 8 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"
