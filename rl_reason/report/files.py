"""Files that are either whole or absent, and JSON that every reader accepts."""

import json
import math
import os
import pathlib
import re
import typing
from collections.abc import Mapping

TMP_SUFFIX = ".tmp"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""``text`` with control characters spelled out, so that a model's output cannot steer a terminal.

    >>> visible("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def jsonable(value: typing.Any) -> typing.Any:
    """``value`` as strict JSON: str keys, lists, numpy and jax scalars as numbers, NaN and infinities as None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # a numpy or jax array or scalar
        return jsonable(value.tolist())
    return str(value)


def to_json(value: typing.Any, *, indent: int | None = None) -> str:
    """Strict JSON (see ``jsonable``) in UTF-8 text; a lone surrogate is escaped, since UTF-8 has none."""
    value = jsonable(value)
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=False)
    return text


def sync_directory(path: pathlib.Path) -> None:
    """Makes the names in a directory durable; does nothing where directories cannot be opened (Windows)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: pathlib.Path, data: str | bytes) -> None:
    """Writes ``path`` whole or not at all, even across a power cut; the old content stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        with open(tmp, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def is_leftover(path: pathlib.Path) -> bool:
    """Whether ``path`` is the temporary file of a ``write_atomic`` that was killed."""
    return path.name.startswith(".") and path.name.endswith(TMP_SUFFIX)
