"""Folders of safetensors: tensors by name over all files, and new folders that are whole or absent."""

import contextlib
import hashlib
import math
import os
import pathlib
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from rl_reason.models.hf_config import WeightsError, first_of, read_json
from rl_reason.report.files import TMP_SUFFIX, sync_directory, to_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARAMS = "params"  # where a folder has its parameters by Orbax, in place of safetensors
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_SHARD_BYTES = 5 * 10**9  # what transformers splits at
SAMPLED_BYTES = 2**16


class Described(typing.NamedTuple):
    """A tensor's shape, and its type in safetensors' words."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder, by name. Bytes are read and not mapped, so that nothing stays in memory.

    Raises:
        WeightsError: files that are missing, cut short or damaged, each by name.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        index = self.folder / INDEX
        promised: Mapping[str, str] = read_json(index).get("weight_map", {}) if index.is_file() else {}
        files = sorted(set(promised.values())) or [ONE]
        missing = [name for name in files if not (self.folder / name).is_file()]
        if missing and promised:
            raise WeightsError(
                f"{index} names {', '.join(missing)}, and {self.folder} has no such file; fetch what is missing."
            )
        if missing:
            raise WeightsError(f"{self.folder} has neither {ONE} nor {INDEX}; {_instead(self.folder)}")
        self._files = {name: _opened(self.folder / name) for name in files}
        self._file_of = {tensor: name for name, file in self._files.items() for tensor in file.keys()}  # noqa: SIM118
        if absent := sorted(set(promised) - set(self._file_of)):
            raise WeightsError(
                f"{index} promises {first_of(absent)}, and {promised[absent[0]]} has no such tensor; fetch both again."
            )

    @property
    def names(self) -> list[str]:
        """Of all tensors there are."""
        return sorted(self._file_of)

    def file_of(self, name: str) -> pathlib.Path:
        """Where a tensor lies."""
        return self.folder / self._file_of[name]

    def described(self, name: str) -> Described:
        """A tensor from its file's header."""
        of = self._files[self._file_of[name]].get_slice(name)
        return Described(tuple(of.get_shape()), of.get_dtype())

    def num_bytes(self, name: str) -> int:
        """Of a tensor's data; at most 8 bytes a number."""
        shape, dtype = self.described(name)
        return math.prod(shape) * (numpy_dtype(DTYPES[dtype]).itemsize if dtype in DTYPES else 8)

    def read(self, name: str, part: tuple[slice | int, ...] = ()) -> np.ndarray:
        """A tensor, or a part of it."""
        try:
            file = self._files[self._file_of[name]]
            return file.get_slice(name)[part] if part else file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(
                f"{self.file_of(name)}: {name} cannot be read ({error}); fetch the file again."
            ) from error


def identity(folder: str | pathlib.Path) -> list[tuple[str, int, int]]:
    """What tells one checkpoint's files from another's without reading them: name, bytes, time of change."""
    files = sorted(path for path in pathlib.Path(folder).iterdir() if path.suffix in (".safetensors", ".json"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def digest(folder: str | pathlib.Path) -> str:
    """What tells one checkpoint's parameters from another's wherever it lies, by a few reads: the names and sizes of its
    files, and their bytes at the beginning, in the middle and at the end."""
    found, folder = hashlib.sha256(), pathlib.Path(folder)
    for path in sorted(
        [*folder.glob("*.safetensors"), *(path for path in (folder / PARAMS).rglob("*") if path.is_file())]
    ):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(size - SAMPLED_BYTES, 0)):
                file.seek(at)
                found.update(file.read(SAMPLED_BYTES))
    return found.hexdigest()[:20]


def _opened(path: pathlib.Path) -> typing.Any:
    try:
        return safetensors.safe_open(path, framework="numpy", backend="pread")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is no whole safetensors file ({error}); it has {path.stat().st_size:,} bytes: fetch it again."
        ) from error


def _instead(folder: pathlib.Path) -> str:
    """What to do about a folder without safetensors."""
    if not folder.is_dir():
        return "there is no such folder."
    if torch := sorted(path.name for path in folder.glob("*.bin")):
        return f"{torch[0]} has torch's own format: load the model in transformers and save_pretrained it."
    return "fetch the checkpoint's safetensors."


@contextlib.contextmanager
def whole_or_absent(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes its name when the block ends well. What is killed leaves ``.NAME.PID.tmp``.

    Raises:
        WeightsError: there is something of that name already.
    """
    refuse_to_overwrite(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}{TMP_SUFFIX}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for path in filter(pathlib.Path.is_file, unfinished.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(unfinished)
        unfinished.rename(folder)
        sync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_to_overwrite(folder: pathlib.Path) -> None:
    """Raises WeightsError where something is in the way."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is there already; name another folder, or delete it.")


def split(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names in their order, in files of at most ``max_bytes``; a larger tensor has a file to itself.

    >>> split(dict(a=3, b=3, c=9, d=1), 6)
    [['a', 'b'], ['c'], ['d']]
    """
    files: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def write_tensors(
    folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], files: Sequence[Sequence[str]], total_bytes: int
) -> None:
    """``tensors`` come in the order of ``files``; at most one file's are held. Adds the index where there are several."""
    names = (
        [ONE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    )
    for file, wanted in zip(names, files, strict=True):
        held = dict(next(tensors) for _ in wanted)
        assert list(held) == list(wanted), "tensors out of order"
        save_file(held, folder / file, metadata={"format": "pt"})  # transformers refuses a file without
    if len(files) > 1:
        where = {name: file for file, wanted in zip(names, files, strict=True) for name in wanted}
        index = dict(metadata=dict(total_size=total_bytes), weight_map=where)
        (folder / INDEX).write_text(to_json(index, indent=2) + "\n")


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by jax's name, bfloat16 among them."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
