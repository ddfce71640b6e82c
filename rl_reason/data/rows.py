"""Rows of users' files by number: jsonl, parquet, and TensorFlow Datasets without TensorFlow."""

import array
import json
import os
import pathlib
import typing
from collections.abc import Iterator

import numpy as np

Row = dict[str, typing.Any]


class BadRowError(ValueError):
    """Why one row cannot be used; where it is gets said by whoever reads the file."""


@typing.runtime_checkable
class RowFile(typing.Protocol):
    """One file; ``row`` may be called from any thread."""

    name: str  # the data source of rows that name none

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """``file:line``, for messages; lines and rows count from 1."""
        ...

    def row(self, index: int) -> Row:
        """Raises BadRowError when it is no mapping with text keys."""
        ...


class JsonlRows:
    """One JSON object a line; memory holds where lines begin, not the lines. Blank lines are passed over."""

    def __init__(self, path: str):
        self._path, self.name = path, pathlib.Path(path).stem
        self._begin, self._size, self._line = array.array("q"), array.array("q"), array.array("q")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  read by position for as long as the source lives
        begin = 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._begin.append(begin)
                    self._size.append(len(line))
                    self._line.append(number)
                begin += len(line)

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return len(self._begin)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._line[index]}"

    def row(self, index: int) -> Row:
        text = os.pread(self._file.fileno(), self._size[index], self._begin[index])
        try:
            row = json.loads(text.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadRowError(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadRowError(f"a JSON {type(row).__name__}, not an object")
        return row


class ParquetRows:
    """A parquet file, kept as Arrow columns: compact, and decoded row by row."""

    def __init__(self, path: str):
        import pyarrow
        import pyarrow.parquet

        self._path, self.name = path, pathlib.Path(path).stem
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def where(self, index: int) -> str:
        return f"{self._path}:{index + 1}"

    def row(self, index: int) -> Row:
        return plain(self._table.slice(index, 1).to_pylist()[0])


class TfdsRows:
    """A TensorFlow Datasets split stored as array_record, by name or by the directory of a prepared version."""

    def __init__(self, dataset: str, split: str):
        import tensorflow_datasets as tfds

        self._path = f"tfds:{dataset}:{split}"
        try:
            if os.path.isdir(dataset):
                builder: typing.Any = tfds.builder_from_directory(dataset)
                self.name, rows = builder.info.name, builder.as_data_source(split=split)
            else:
                self.name, rows = dataset.partition("/")[0], tfds.data_source(dataset, split=split)
            self._rows: typing.Any = rows
        except Exception as error:
            # tfds raises everything from KeyError to its own types, and without TensorFlow often an odd one
            raise ValueError(
                f"{self._path}: {type(error).__name__}: {error}. Only array_record can be read without TensorFlow: "
                "prepare it with tfds.builder(name, file_format='array_record').download_and_prepare()."
            ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._path}:{index + 1}"

    def row(self, index: int) -> Row:
        return plain(self._rows[index])


def plain(value: typing.Any) -> typing.Any:
    """The value as JSON has it: text for bytes and dates, lists for arrays and tuples, numbers for numpy's.

    Raises:
        BadRowError: for bytes that are no text.

    >>> plain({"a": (b"x", np.int32(3))})
    {'a': ['x', 3]}
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRowError(f"bytes that are not UTF-8 text: {error}") from error
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)  # dates, decimals


def open_rows(path: str) -> RowFile:
    """A file's reader, by its suffix; 'tfds:<name or directory>:<split>' is a TensorFlow Datasets split.

    Raises:
        ValueError: when there is no such file, or no reader for it.
    """
    if path.startswith("tfds:"):
        dataset, _, split = path.removeprefix("tfds:").rpartition(":")
        if not dataset or not split:
            raise ValueError(f"data.files: {path!r}: write 'tfds:<name or directory>:<split>'.")
        return TfdsRows(dataset, split)
    if not os.path.isfile(path):
        raise ValueError(f"data.files: no file {path!r} (from {os.getcwd()}).")
    suffix = pathlib.Path(path).suffix
    if suffix == ".jsonl":
        return JsonlRows(path)
    if suffix == ".parquet":
        return ParquetRows(path)
    raise ValueError(f"data.files: {path!r}: use .jsonl (one object a line), .parquet or tfds:<name>:<split>.")


def scan(file: RowFile) -> Iterator[tuple[int, Row | BadRowError]]:
    """Every row with its number; a bad one as its error."""
    for index in range(len(file)):
        try:
            yield index, file.row(index)
        except BadRowError as error:
            yield index, error
