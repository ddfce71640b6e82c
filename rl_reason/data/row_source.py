"""Finite examples from users' files."""

import array
import dataclasses
import hashlib
import logging
import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rl_reason.data.chat import ChatError
from rl_reason.data.example import Example, Message, check_split, digest, mix, permuted
from rl_reason.data.rows import BadRowError, RowFile, open_rows, scan
from rl_reason.data.schema import TEMPLATE, Keys, Parsed, chat_renderer, parse
from rl_reason.tasks.base import HELDOUT_SHARE

logger = logging.getLogger(__name__)
SHOWN_BAD_ROWS = 5


@dataclasses.dataclass
class LoadReport:
    """What became of the rows that were read."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    too_long: int = 0
    other_split: int = 0
    also_heldout: int = 0  # train rows whose prompt is held out too
    first_bad: list[str] = dataclasses.field(default_factory=list)  # 'file:line: reason' of the first few

    @property
    def dropped(self) -> int:
        """Rows that serve neither split."""
        return self.bad + self.too_long + self.also_heldout

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.rows} rows kept; {self.other_split} are of the other split, {self.bad} malformed, "
            f"{self.too_long} too long, {self.also_heldout} in train though held out"
        )


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read and which are kept; the fields are ``make_source``'s arguments."""

    split: str
    verifier: str | Mapping[str, str]  # one for all, or by data_source
    keys: Keys = dataclasses.field(default_factory=Keys)
    chat: str = "plain"
    on_bad_row: str = "refuse"  # or 'skip': counted, reported
    on_long_prompt: str = "refuse"  # or 'drop': counted, reported
    max_prompt_len_tokens: int | None = None  # BOS included
    prompt_ids: Callable[[str | Sequence[Message]], Sequence[int]] | None = None  # of a prompt, BOS included

    def __post_init__(self):
        check_split(self.split)
        for name, choices in (("on_bad_row", ("refuse", "skip")), ("on_long_prompt", ("refuse", "drop"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name}={getattr(self, name)!r}: use one of {', '.join(choices)}.")
        if not self.verifier:
            raise ValueError("data.verifier is empty; name a task, or a reward function as 'module:compute_score'.")


class RowSource:
    """Rows of files; each epoch is a shuffle of its own, keyed by (seed, epoch)."""

    def __init__(
        self,
        files: Sequence[str],
        reading: Reading,
        *,
        seed: int,
        heldout_files: Sequence[str] = (),
        shuffle: bool = True,
    ):
        """Reads every row once. Train is ``files`` and held out is ``heldout_files``, where those are given; else a
        row is where its split key says, else where the hash of its prompt says. A prompt held out is not in train.

        Raises:
            ValueError: 'file:line: reason' of a row that cannot be used, or when no row is left.
        """
        self._reading, self._seed, self._shuffle = reading, seed, shuffle
        self._render = chat_renderer(reading.chat)
        self._files = [open_rows(path) for path in (*files, *heldout_files)]
        self._first_id = np.cumsum([0, *(len(file) for file in self._files)])
        index = _Index(len(files) if heldout_files else None)
        for number, file in enumerate(self._files):
            self._read(number, file, index)
        self.report = index.report
        self._ids = index.chosen(reading.split)
        self.names = tuple(sorted(index.sources))
        self.verifiers = tuple(sorted(index.verifiers))
        self.num_examples: int | None = len(self._ids)
        self._routes = {name: route for route, name in enumerate(self.names)}
        self.fingerprint = digest(
            "rows", index.content.hexdigest(), self._ids.tobytes(), seed, shuffle, reading.split, reading.chat
        )
        if self.report.dropped:
            where, why = ", ".join((*files, *heldout_files)), "".join(f"\n  {bad}" for bad in self.report.first_bad)
            logger.warning("%s, %s rows: %s.%s", where, reading.split, self.report, why)
        if not self.num_examples:
            raise ValueError(
                f"no {reading.split} rows: {self.report}. Give data.heldout_files, or set data.split_key=None to "
                "split by content whatever the rows say." + "".join(f"\n{bad}" for bad in self.report.first_bad)
            )

    def example(self, uid: int) -> Example:
        epoch, position = divmod(uid, len(self._ids))
        if self._shuffle:
            position = permuted(position, len(self._ids), mix(self._seed, epoch))
        example_id = int(self._ids[position])
        number = int(np.searchsorted(self._first_id, example_id, side="right")) - 1
        file, row = self._files[number], example_id - int(self._first_id[number])
        try:
            parsed = self._parse(file, file.row(row))
        except BadRowError as error:
            raise ValueError(
                f"{file.where(row)} changed while in use: {error}. Do not edit data during a run."
            ) from error
        return Example(
            source=parsed.data_source,
            example_id=example_id,
            prompt=parsed.prompt.text,
            problem=parsed.problem,
            demonstration=parsed.demonstration,
            reference=parsed.reference,
            verifier=parsed.verifier,
            route=self._routes[parsed.data_source],
            messages=self._messages(parsed),
        )

    def _messages(self, parsed: Parsed) -> tuple[Message, ...] | None:
        return parsed.prompt.messages if self._reading.chat == TEMPLATE else None

    def _parse(self, file: RowFile, row: dict[str, typing.Any]) -> Parsed:
        return parse(row, self._reading.keys, name=file.name, verifier=self._reading.verifier, render=self._render)

    def _read(self, number: int, file: RowFile, index: "_Index") -> None:
        """Adds a file's usable rows to the index."""
        for row_number, row in scan(file):
            index.report.rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                parsed = self._parse(file, row)
                split = index.split_of(number, parsed)
                fits = split != self._reading.split or self._fits(file.where(row_number), parsed)
            except (BadRowError, ChatError) as error:
                self._bad(f"{file.where(row_number)}: {error}", index.report)
                continue
            index.add(int(self._first_id[number]) + row_number, split, parsed, too_long=not fits)

    def _bad(self, message: str, report: LoadReport) -> None:
        if self._reading.on_bad_row == "refuse":
            raise ValueError(f"{message}. Mend the row, or set data.on_bad_row='skip'.")
        report.bad += 1
        if len(report.first_bad) < SHOWN_BAD_ROWS:
            report.first_bad.append(message)

    def _fits(self, where: str, parsed: Parsed) -> bool:
        reading = self._reading
        if reading.max_prompt_len_tokens is None or reading.prompt_ids is None:
            return True
        length = len(reading.prompt_ids(self._messages(parsed) or parsed.prompt.text))
        if length > reading.max_prompt_len_tokens and reading.on_long_prompt == "refuse":
            raise ValueError(
                f"{where}: the prompt has {length} tokens, BOS included, and data.max_prompt_len_tokens is "
                f"{reading.max_prompt_len_tokens}. Raise it, or set data.on_long_prompt='drop'."
            )
        return length <= reading.max_prompt_len_tokens


class _Index:
    """Three numbers a row: which, the hash of its prompt, and its split."""

    def __init__(self, num_train_files: int | None):
        """``num_train_files``: how many files are train's, the rest being held out; None when rows decide."""
        self.report = LoadReport()
        self.sources: set[str] = set()
        self.verifiers: set[str] = set()
        self.content = hashlib.blake2b(digest_size=16)
        self._num_train_files = num_train_files
        self._ids, self._prompts = array.array("q"), array.array("Q")
        self._heldout, self._too_long = array.array("b"), array.array("b")

    def split_of(self, file_number: int, parsed: Parsed) -> str:
        """The split of a row of a file."""
        if self._num_train_files is not None:
            return "train" if file_number < self._num_train_files else "heldout"
        return parsed.split or ("heldout" if _hash(parsed) % HELDOUT_SHARE == 0 else "train")

    def add(self, example_id: int, split: str, parsed: Parsed, *, too_long: bool) -> None:
        """Notes a row."""
        self._ids.append(example_id)
        self._prompts.append(_hash(parsed))
        self._heldout.append(split == "heldout")
        self._too_long.append(too_long)
        self.sources.add(parsed.data_source)
        self.verifiers.add(parsed.verifier)
        self.content.update(repr((example_id, parsed)).encode())

    def chosen(self, split: str) -> np.ndarray:
        """Ids of the split's rows, and the report's remaining counts."""
        ids, prompts = np.array(self._ids, np.int64), np.array(self._prompts, np.uint64)
        heldout, too_long = np.array(self._heldout, bool), np.array(self._too_long, bool)
        also_heldout = ~heldout & np.isin(prompts, prompts[heldout])
        of_split = heldout if split == "heldout" else ~heldout & ~also_heldout
        keep = of_split & ~too_long
        self.report.kept = int(keep.sum())
        self.report.too_long = int((of_split & too_long).sum())
        self.report.also_heldout = int(also_heldout.sum()) if split == "train" else 0
        self.report.other_split = len(ids) - int(of_split.sum()) - self.report.also_heldout
        return ids[keep]


def _hash(parsed: Parsed) -> int:
    """Of what is asked: not of the answer, nor of spaces, in which copies of a prompt differ."""
    key = " ".join(parsed.prompt.text.split()).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
