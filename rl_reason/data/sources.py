"""Where examples come from: the one place that picks among sources."""

from collections.abc import Callable, Mapping, Sequence

from rl_reason.data.example import Example, Message, Source
from rl_reason.data.row_source import LoadReport, Reading, RowSource
from rl_reason.data.schema import AUTO, Keys
from rl_reason.data.task_source import TaskSource, load_task

__all__ = ["Example", "Keys", "LoadReport", "Reading", "RowSource", "Source", "TaskSource", "load_task", "make_source"]


def make_source(
    *,
    seed: int,
    split: str = "train",
    tasks: Sequence[str] = (),
    levels: Sequence[Sequence[int]] | None = None,
    weights: Sequence[float | int] | None = None,
    num_examples: int = 0,
    files: Sequence[str] = (),
    heldout_files: Sequence[str] = (),
    verifier: str | Mapping[str, str] | None = None,
    prompt_key: str = "prompt",
    answer_key: str | None = AUTO,
    data_source_key: str = "data_source",
    split_key: str | None = "extra_info.split",
    demonstration_key: str | None = None,
    chat: str = "plain",
    shuffle: bool = True,
    on_bad_row: str = "refuse",
    on_long_prompt: str = "refuse",
    max_prompt_len_tokens: int | None = None,
    prompt_ids: Callable[[str | Sequence[Message]], Sequence[int]] | None = None,
) -> Source:
    """A source of ``tasks`` or of ``files``; the arguments are the config's ``data``.

    ``prompt_ids`` makes tokens of prompts, BOS included; with it, those that are too long are found now, not during the run.

    Raises:
        ValueError: naming the setting and the cure.
    """
    if bool(tasks) == bool(files):
        both = "data.tasks and data.files are both set" if tasks else "neither data.tasks nor data.files is set"
        raise ValueError(
            f"{both}; set data.tasks to registered tasks, or data.files to .jsonl, .parquet or tfds: data."
        )
    if tasks:
        misplaced = [name for name, value in (("heldout_files", heldout_files), ("verifier", verifier)) if value]
        if misplaced:
            raise ValueError(
                f"data.{misplaced[0]} goes with data.files; tasks split by content and verify themselves."
            )
        return TaskSource(
            tasks, seed=seed, split=split, levels=levels or None, weights=weights, num_examples=num_examples or None
        )
    if levels or weights or num_examples:
        raise ValueError(
            "data.levels, data.weights and data.num_examples go with data.tasks; leave them empty, and repeat a file in "
            "data.files to weigh it."
        )
    if verifier is None:
        raise ValueError(
            "data.files needs data.verifier: a reward function as 'module:compute_score', a task's name, "
            "or {data_source: either}."
        )
    for name, paths in (("files", files), ("heldout_files", heldout_files)):
        if isinstance(paths, str):
            raise ValueError(f"data.{name} is the text {paths!r}; make it a list of paths.")
    reading = Reading(
        split=split,
        verifier=verifier,
        keys=Keys(prompt_key, answer_key, data_source_key, split=split_key, demonstration=demonstration_key),
        chat=chat,
        on_bad_row=on_bad_row,
        on_long_prompt=on_long_prompt,
        max_prompt_len_tokens=max_prompt_len_tokens,
        prompt_ids=prompt_ids,
    )
    return RowSource(files, reading, seed=seed, heldout_files=heldout_files, shuffle=shuffle)
