"""Choosing among the implementations of one operation."""

from collections.abc import Mapping
from typing import TypeVar

F = TypeVar("F")


def named(op: str, implementations: Mapping[str, F], name: str) -> F:
    """The implementation called ``name``; a ``ValueError`` that lists the others when there is none."""
    if name not in implementations:
        known = ", ".join(f'"{known}"' for known in implementations)
        raise ValueError(
            f'{op}: implementation="{name}" does not exist; use one of {known}, or None to choose by size'
        )
    return implementations[name]
