"""Worked solutions packed into rows of one width, by grain's first-fit: little padding, and no example is cut."""

import typing
from collections.abc import Iterator

import grain
import numpy as np

from rl_reason.data.example import Source
from rl_reason.data.stream import MAX_UID, ExampleError, Tokenizer, worked_tokens


class PackedRows(typing.NamedTuple):
    """Rows of several examples: tokens, whether each is to be predicted, and which example it is of (1, 2, ...; 0 pad)."""

    tokens: np.ndarray  # Int32 [N T]
    loss_mask: np.ndarray  # Bool [N T]
    segments: np.ndarray  # Int32 [N T]


class PackedStream:
    """Endless ``PackedRows``; its state is grain's, as JSON. Every process packs everything and keeps its own ``rows``."""

    def __init__(self, batches: grain.DatasetIterator, rows: range):
        self._batches, self._rows = batches, list(rows)

    def __iter__(self) -> Iterator[PackedRows]:
        return self

    def __next__(self) -> PackedRows:
        packed = next(self._batches)
        own = lambda x: np.asarray(x)[self._rows]
        tokens, segments = own(packed["tokens"]), own(packed["tokens_segment_ids"])
        return PackedRows(
            tokens.astype(np.int32), own(packed["predicted"]).astype(bool) & (segments > 0), segments.astype(np.int32)
        )

    def get_state(self) -> typing.Any:
        return self._batches.get_state()

    def set_state(self, state: typing.Any) -> None:
        self._batches.set_state(state)


def packed_stream(
    source: Source,
    tokenizer: Tokenizer,
    *,
    rows_per_batch: int,
    row_len: int,
    direct_share: float,
    rows: range | None = None,
) -> PackedStream:
    """Batches of ``rows_per_batch`` rows of ``row_len`` tokens, filled with examples in the order of their draws.

    An example is BOS, prompt, demonstration, EOS. A share ``direct_share``, chosen by draw number, shows the bare answer.

    Raises:
        ExampleError: on reaching an example that is longer than a row, or that lacks a demonstration.
    """

    def one(uid: int) -> dict[str, np.ndarray]:
        prompt, worked = worked_tokens(source, tokenizer, int(uid), row_len, row_len, direct_share)
        whole = prompt + worked
        if len(whole) > row_len:
            example = source.example(int(uid))
            raise ExampleError(
                f"example {example.example_id} of {example.source!r} has {len(whole)} tokens, and "
                f"supervised.row_len_tokens is {row_len}. Raise it, or leave such examples out of the data."
            )
        predicted = np.arange(len(whole)) >= len(prompt)
        return {"tokens": np.array(whole, np.int32), "predicted": predicted.astype(np.int32)}

    examples = grain.MapDataset.range(MAX_UID).map(one).to_iter_dataset(grain.ReadOptions(num_threads=1))
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"tokens": row_len, "predicted": row_len},
        num_packing_bins=rows_per_batch,
        shuffle_bins=False,
        padding_struct={"tokens": tokenizer.pad_id, "predicted": 0},
    )
    return PackedStream(
        iter(packed.batch(rows_per_batch, drop_remainder=True)), range(rows_per_batch) if rows is None else rows
    )
