"""Preference pairs: what one is, reading users' files of them, and batches through grain."""

import dataclasses
import logging
import typing
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from rl_reason.data.chat import ChatError
from rl_reason.data.example import Message, mix, permuted
from rl_reason.data.row_source import SHOWN_BAD_ROWS
from rl_reason.data.rows import BadRowError, Row, open_rows, scan
from rl_reason.data.schema import TEMPLATE, Keys, Prompt, chat_renderer, prompt_of
from rl_reason.data.stream import Tokenizer, pad, span_mask, step_stream

logger = logging.getLogger(__name__)
FORMATS = (
    "text in prompt, chosen and rejected; or a list of messages in each, with one answer in chosen and in rejected; or no "
    "prompt, and chats in chosen and rejected that differ in their last message"
)


class Preference(typing.NamedTuple):
    """One pair as token ids: the prompt with BOS, completions with what ended them (EOS, or nothing where cut short)."""

    prompt: Int[np.ndarray, " p"]
    chosen: Int[np.ndarray, " c"]
    rejected: Int[np.ndarray, " r"]


class PairBatch(typing.NamedTuple):
    """Numpy rows of M pairs; fields and their order are ``loop.preference.Pairs``', so ``Pairs(*batch)``."""

    chosen_tokens: Int[np.ndarray, "M T"]
    rejected_tokens: Int[np.ndarray, "M T"]
    prompt_len: Int[np.ndarray, " M"]
    chosen_mask: Bool[np.ndarray, "M T"]
    rejected_mask: Bool[np.ndarray, "M T"]
    ref_chosen_logprobs: Float[np.ndarray, " M"] | None
    ref_rejected_logprobs: Float[np.ndarray, " M"] | None


@dataclasses.dataclass
class PairReport:
    """What became of the rows that were read."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    too_long: int = 0
    identical: int = 0  # chosen is rejected: nothing to learn
    first_bad: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.rows} pairs kept; {self.bad} malformed, {self.too_long} too long, {self.identical} with "
            "chosen and rejected the same"
        )


@dataclasses.dataclass(frozen=True)
class PairReading:
    """How files of pairs are read; names are those of the config's ``data``."""

    max_prompt_len_tokens: int  # BOS included
    max_completion_len_tokens: int  # EOS included
    chat: str = "plain"
    on_bad_row: str = "refuse"  # or 'skip': counted, reported
    on_long_pair: str = "refuse"  # or 'drop': counted, reported

    def __post_init__(self):
        for name, choices in (("on_bad_row", ("refuse", "skip")), ("on_long_pair", ("refuse", "drop"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(choices)}.")


class LoadedPairs(typing.NamedTuple):
    """Pairs in the order of their files, and what was left out."""

    pairs: list[Preference]
    report: PairReport


def load_pairs(paths: Sequence[str], tokenizer: Tokenizer, reading: PairReading) -> LoadedPairs:
    """The pairs of .jsonl, .parquet or tfds: data in TRL's formats, tokenized; each completion is given EOS.

    Pairs whose completions are the same are left out and counted.

    Raises:
        ValueError: 'file:line: reason' of a row that cannot be used, or when nothing is left.
    """
    if isinstance(paths, str):
        paths = (paths,)
    render, report, pairs = chat_renderer(reading.chat), PairReport(), []
    for path in paths:
        file = open_rows(path)
        for number, row in scan(file):
            report.rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                prompt, chosen, rejected = _parse(row, render)
                asked = prompt.messages if prompt.messages and reading.chat == TEMPLATE else prompt.text
                prompt_ids = tokenizer.prompt(asked)
            except (BadRowError, ChatError) as error:
                _bad(f"{file.where(number)}: {error}", reading, report)
                continue
            if chosen == rejected:
                report.identical += 1
                continue
            pair = Preference(
                np.array(prompt_ids, np.int32),
                *(np.array([*tokenizer.encode(x), tokenizer.eos_id], np.int32) for x in (chosen, rejected)),
            )
            if _fits(file.where(number), pair, reading):
                pairs.append(pair)
            else:
                report.too_long += 1
    report.kept = len(pairs)
    why = "".join(f"\n  {bad}" for bad in report.first_bad)
    if not pairs:
        raise ValueError(f"no pairs in {', '.join(paths)}: {report}.{why}")
    if report.kept < report.rows:
        logger.warning("%s: %s.%s", ", ".join(paths), report, why)
    return LoadedPairs(pairs, report)


def _bad(message: str, reading: PairReading, report: PairReport) -> None:
    if reading.on_bad_row == "refuse":
        raise ValueError(f"{message}. Mend the row, or set on_bad_row='skip'.")
    report.bad += 1
    if len(report.first_bad) < SHOWN_BAD_ROWS:
        report.first_bad.append(message)


def _fits(where: str, pair: Preference, reading: PairReading) -> bool:
    limits = (
        ("prompt", reading.max_prompt_len_tokens),
        *((x, reading.max_completion_len_tokens) for x in pair._fields[1:]),
    )
    for (name, limit), tokens in zip(limits, pair, strict=True):
        if len(tokens) > limit:
            if reading.on_long_pair == "drop":
                return False
            key, framing = ("prompt", "BOS") if name == "prompt" else ("completion", "EOS")
            raise ValueError(
                f"{where}: {name} has {len(tokens)} tokens, {framing} included, and max_{key}_len_tokens is {limit}. Raise "
                "it, or set on_long_pair='drop'."
            )
    return True


def _parse(row: Row, render: Callable[[Sequence[Message]], str]) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected), the latter two as text; a completion's role is dropped. Raises BadRowError."""
    sides = {name: row.get(name) for name in ("chosen", "rejected")}
    for name, value in sides.items():
        if value is None:
            raise BadRowError(f"no {name}; it has {', '.join(row)}. Pairs are {FORMATS}")
    chosen, rejected = sides.values()
    if isinstance(chosen, str) and isinstance(rejected, str):
        if row.get("prompt") is None:
            raise BadRowError(
                f"no prompt, and chosen is text; where the prompt ends has to be said. Pairs are {FORMATS}"
            )
        return prompt_of(row, Keys(), render), chosen, rejected
    heads, answers = zip(*(_last_message(name, value) for name, value in sides.items()), strict=True)
    if heads[0] != heads[1]:
        raise BadRowError("chosen and rejected differ before their last message, so they answer different prompts")
    given = row.get("prompt")
    if given is None:
        row = {"prompt": heads[0]}
    elif heads[0] and heads[0] != _bare(given if isinstance(given, list) else [{"role": "user", "content": given}]):
        raise BadRowError("chosen begins with other messages than the prompt's; with a prompt it is the answer alone")
    return prompt_of(row, Keys(), render), *answers


def _last_message(name: str, value: typing.Any) -> tuple[list[Message], str]:
    """The messages before the answer, and the answer's text."""
    if not isinstance(value, list) or not value:
        raise BadRowError(
            f"{name} is {type(value).__name__}, and chosen and rejected go together. Pairs are {FORMATS}"
        )
    last = value[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise BadRowError(f"{name} does not end with an assistant's text: {last!r:.80}")
    return _bare(value[:-1]), last["content"]


def _bare(messages: list) -> list[Message]:
    """The messages without what is neither role nor content."""
    return [{key: x.get(key) for key in ("role", "content")} for x in messages if isinstance(x, dict)]


def to_batch(
    pairs: Sequence[Preference], *, prompt_len: int, completion_len: int, pad_id: int, reference=(None, None)
) -> PairBatch:
    """Rows of width ``prompt_len + completion_len`` tokens: prompt, completion, padding. They have to fit."""
    width = prompt_len + completion_len
    prompts = [pair.prompt.tolist() for pair in pairs]
    chosen = [prompt + pair.chosen.tolist() for prompt, pair in zip(prompts, pairs, strict=True)]
    rejected = [prompt + pair.rejected.tolist() for prompt, pair in zip(prompts, pairs, strict=True)]
    return PairBatch(
        chosen_tokens=pad(chosen, width, pad_id),
        rejected_tokens=pad(rejected, width, pad_id),
        prompt_len=np.array([len(prompt) for prompt in prompts], np.int32),
        chosen_mask=span_mask(prompts, chosen, width),
        rejected_mask=span_mask(prompts, rejected, width),
        ref_chosen_logprobs=reference[0],
        ref_rejected_logprobs=reference[1],
    )


@dataclasses.dataclass(frozen=True)
class PairData:
    """A data set of pairs that fit, and what the reference says of them once that is known."""

    pairs: Sequence[Preference]
    prompt_len: int  # width in tokens, BOS included
    completion_len: int  # width in tokens, EOS included
    pad_id: int
    reference: tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]] | None = None  # nats, chosen and rejected

    def __post_init__(self):
        if not self.pairs:
            raise ValueError("PairData: no pairs; loosen what selects them.")
        for number, pair in enumerate(self.pairs):
            prompt, longest = len(pair.prompt), max(len(pair.chosen), len(pair.rejected))
            if not 1 <= prompt <= self.prompt_len or longest > self.completion_len:
                raise ValueError(
                    f"PairData: pair {number} has a prompt of {prompt} and a completion of {longest} tokens; the widths are "
                    f"1..{self.prompt_len} and {self.completion_len}. Raise them, or drop such pairs."
                )
        if self.reference is not None and {len(x) for x in self.reference} != {len(self.pairs)}:
            raise ValueError(f"PairData: reference log-probabilities are not {len(self.pairs)}, one a pair.")

    def rows(self, numbers: Sequence[int]) -> PairBatch:
        """The batch of the pairs of these numbers."""
        chosen = [self.pairs[number] for number in numbers]
        reference = (None, None) if self.reference is None else tuple(x[list(numbers)] for x in self.reference)
        widths = dict(prompt_len=self.prompt_len, completion_len=self.completion_len, pad_id=self.pad_id)
        return to_batch(chosen, **widths, reference=reference)

    def in_order(self, batch_size: int, rows: range | None = None) -> Iterator[PairBatch]:
        """One pass, for ``precompute_reference``; the last batch is filled up with its last pair."""
        rows = range(batch_size) if rows is None else rows
        for start in range(0, len(self.pairs), batch_size):
            yield self.rows([min(start + row, len(self.pairs) - 1) for row in rows])


def pairs_stream(
    data: PairData,
    *,
    batch_size: int,
    seed: int,
    rows: range | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[PairBatch]:
    """Endless batches; row r of step k is the draw ``k * batch_size + r``, and each epoch a shuffle keyed by (seed, epoch).

    ``rows`` are those of the global batch that this process makes. State and resuming are ``prompt_stream``'s.
    """

    def batch(uids: list[int]) -> PairBatch:
        places = [divmod(uid, len(data.pairs)) for uid in uids]
        return data.rows([permuted(position, len(data.pairs), mix(seed, epoch)) for epoch, position in places])

    return step_stream(batch, batch_size, rows, num_threads, prefetch)
