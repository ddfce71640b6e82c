"""Batches of examples through grain: the batch of a step is a pure function of (source, step), and so is resuming.

An iterator's state is the number of the next step, which no process count, thread or prefetched batch enters.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int

from rl_reason.data.chat import ChatError
from rl_reason.data.example import Example, Message, Source, mix
from rl_reason.tasks.base import ANSWER_MARK
from rl_reason.types import Prompts, on_host

MAX_UID = 2**31 - 1  # Prompts.uid is int32
DIRECT = 0xD1  # keeps this choice apart from the source's own


class ExampleError(ValueError):
    """An example that does not fit the run's lengths, or lacks what the run needs of it."""


@typing.runtime_checkable
class Tokenizer(typing.Protocol):
    """Text to token ids, and the ids that frame them."""

    pad_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def prompt(self, asked: str | Sequence[Message]) -> list[int]: ...


def prompt_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_len: int,
    reference_len: int | None = None,
    demonstration_len: int | None = None,
    rows: range | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[Prompts]:
    """Endless ``Prompts`` of numpy arrays, lengths in tokens; row r of step k is the draw ``k * batch_size + r``.

    ``rows`` are those of the global batch that this process makes, ``reference_len`` and ``demonstration_len`` ask for
    the oracle's answer and the worked solution.

    Raises:
        ExampleError: on reaching an example that does not fit, naming it, its length and the config key.
    """

    def batch(uids: list[int]) -> Prompts:
        examples = [source.example(uid) for uid in uids]
        prompts = [prompt_tokens(tokenizer, example, prompt_len) for example in examples]
        reference = demonstration = None
        if reference_len is not None:
            answers = [reference_tokens(tokenizer, example, reference_len) for example in examples]
            reference = pad(answers, reference_len, tokenizer.pad_id)
        if demonstration_len is not None:
            worked = [demonstration_tokens(tokenizer, example, demonstration_len) for example in examples]
            demonstration = pad(worked, demonstration_len, tokenizer.pad_id)
        return host_prompts(
            tokens=pad(prompts, prompt_len, tokenizer.pad_id),
            prompt_len=np.array([len(prompt) for prompt in prompts], np.int32),
            example_id=np.array([example.example_id for example in examples], np.int32),
            uid=np.array(uids, np.int32),
            route=np.array([example.route for example in examples], np.int32),
            reference=reference,
            demonstration=demonstration,
        )

    return step_stream(batch, batch_size, rows, num_threads, prefetch)


def supervised_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_len: int,
    demonstration_len: int,
    direct_share: float = 0.0,
    rows: range | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (tokens Int[B T], loss_mask Bool[B T]) of worked solutions, T = prompt_len + demonstration_len tokens.

    A share ``direct_share`` of the rows, chosen by draw number, shows the bare answer without its steps.
    A row is BOS, prompt, demonstration, EOS, padding. The mask is on a position whose token is to be predicted: the
    demonstration's and EOS. Rows, order, state and errors are ``prompt_stream``'s.
    """
    width = prompt_len + demonstration_len

    def batch(uids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        read = [worked_tokens(source, tokenizer, uid, prompt_len, demonstration_len, direct_share) for uid in uids]
        prompts, whole = [prompt for prompt, _ in read], [prompt + rest for prompt, rest in read]
        return pad(whole, width, tokenizer.pad_id), span_mask(prompts, whole, width)

    return step_stream(batch, batch_size, rows, num_threads, prefetch)


def step_stream(
    batch: Callable[[list[int]], typing.Any], batch_size: int, rows: range | None, num_threads: int, prefetch: int
) -> grain.DatasetIterator:
    """Endless ``batch(uids)``, step k's uids being ``k * batch_size + row``; state is the number of the next step."""
    rows = range(batch_size) if rows is None else rows
    if not 0 < batch_size <= MAX_UID or not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {rows} of a batch of {batch_size}: use a non-empty range within the batch.")
    steps = grain.MapDataset.range(MAX_UID // batch_size)  # as many as uids last: endless in practice
    batches = steps.map(lambda step: batch([int(step) * batch_size + row for row in rows]))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))


def prompt_tokens(tokenizer: Tokenizer, example: Example, limit: int) -> list[int]:
    """The prompt, with what the tokenizer puts around one: BOS, or a chat template."""
    try:
        tokens = tokenizer.prompt(example.asked)
    except ChatError as error:
        raise ExampleError(f"{_name(example)}: {error}. Leave such examples out of the data.") from error
    return _within(tokens, limit, example, "prompt", "BOS included")


def reference_tokens(tokenizer: Tokenizer, example: Example, limit: int) -> list[int]:
    """The oracle's answer, bare."""
    if example.reference is None:
        raise ExampleError(f"{_name(example)} has no reference answer; set data.answer_key to the column that has it.")
    return _within(tokenizer.encode(example.reference), limit, example, "reference", "bare")


def demonstration_tokens(tokenizer: Tokenizer, example: Example, limit: int) -> list[int]:
    """The worked completion and EOS."""
    if example.demonstration is None:
        raise ExampleError(
            f"{_name(example)} has no demonstration; set data.demonstration_key to the column that has it."
        )
    tokens = [*tokenizer.encode(example.demonstration), tokenizer.eos_id]
    return _within(tokens, limit, example, "demonstration", "EOS included")


def worked_tokens(
    source: Source, tokenizer: Tokenizer, uid: int, prompt_len: int, demonstration_len: int, direct_share: float
) -> tuple[list[int], list[int]]:
    """(BOS and prompt, demonstration and EOS) of a draw; the bare answer for demonstration in a share of the draws."""
    example = source.example(uid)
    shown = directly(example) if is_direct(uid, direct_share) else example
    return prompt_tokens(tokenizer, example, prompt_len), demonstration_tokens(tokenizer, shown, demonstration_len)


def is_direct(uid: int, share: float) -> bool:
    """Whether draw ``uid`` is one of the ``share`` that answer without steps: the same in every process."""
    return mix(DIRECT, uid) < share * 2**64


def directly(example: Example) -> Example:
    """The same example with a demonstration that is its answer alone."""
    if example.reference is None:
        raise ValueError(f"{_name(example)} has no reference answer to show directly; set warmup.direct_share=0.")
    return dataclasses.replace(example, demonstration=f"{ANSWER_MARK}{example.reference}")


def _within(tokens: list[int], limit: int, example: Example, what: str, framing: str) -> list[int]:
    if len(tokens) <= limit:
        return tokens
    raise ExampleError(
        f"the {what} of {_name(example)} has {len(tokens)} tokens, {framing}, and data.max_{what}_len_tokens is "
        f"{limit}. Raise it, or leave such examples out of the data."
    )


def _name(example: Example) -> str:
    return f"example {example.example_id} of {example.source!r}"


def pad(sequences: list[list[int]], width: int, pad_id: int) -> Int[np.ndarray, "B T"]:
    """Rows from column 0, filled up with ``pad_id``.

    >>> pad([[1], [2, 3]], 3, 0).tolist()
    [[1, 0, 0], [2, 3, 0]]
    """
    out = np.full((len(sequences), width), pad_id, np.int32)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence
    return out


def span_mask(starts: list[list[int]], wholes: list[list[int]], width: int) -> Bool[np.ndarray, "B T"]:
    """True from the end of each start to the end of its whole.

    >>> span_mask([[1]], [[1, 2, 3]], 4).tolist()
    [[False, True, True, False]]
    """
    begin = np.array([len(start) for start in starts])[:, None]
    end = np.array([len(whole) for whole in wholes])[:, None]
    column = np.arange(width)
    return (column >= begin) & (column < end)


def host_prompts(
    *,
    tokens: Int[np.ndarray, "B P"],
    prompt_len: Int[np.ndarray, " B"],
    example_id: Int[np.ndarray, " B"],
    uid: Int[np.ndarray, " B"],
    route: Int[np.ndarray, " B"],
    reference: Int[np.ndarray, "B R"] | None,
    demonstration: Int[np.ndarray, "B D"] | None,
) -> Prompts:
    """``Prompts`` around numpy arrays, whose shapes are checked here."""
    return on_host(
        Prompts,
        tokens=tokens,
        prompt_len=prompt_len,
        example_id=example_id,
        uid=uid,
        route=route,
        reference=reference,
        demonstration=demonstration,
    )
