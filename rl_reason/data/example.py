"""What a source hands out: examples, drawn by a number. Free of jax, so that verifying processes may import it."""

import dataclasses
import hashlib
import struct
import typing
from collections.abc import Mapping

from rl_reason.tasks.base import Problem

Message = Mapping[str, typing.Any]  # of a chat: role, content, and what else a template reads
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and what judges its completions."""

    source: str  # names[route]
    example_id: int  # below 2**31; the same example drawn twice has the same one
    prompt: str  # as text, which is what is shown
    problem: Problem
    demonstration: str | None  # a worked completion, without EOS
    reference: str | None  # the oracle answer alone
    verifier: str  # a task's name, or "module:attribute"
    route: int
    messages: tuple[Message, ...] | None = None  # what a chat template renders in place of the prompt

    @property
    def asked(self) -> str | tuple[Message, ...]:
        """What ``prompt`` of a tokenizer makes ids of."""
        return self.prompt if self.messages is None else self.messages


@typing.runtime_checkable
class Source(typing.Protocol):
    """Examples by draw number."""

    names: tuple[str, ...]  # tasks or data sources; Example.route indexes it
    verifiers: tuple[str, ...]  # every verifier that its examples name, to be checked before a run
    num_examples: int | None  # None: endless. Otherwise uids of one epoch; further uids are further epochs
    fingerprint: str  # changes with whatever changes the examples

    def example(self, uid: int) -> Example:
        """The example of draw ``uid`` >= 0: a pure function, the same in every process and thread."""
        ...


def digest(*parts: object) -> str:
    """A hexadecimal name for these values (their ``repr``), the same in every process.

    >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
    True
    """
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def mix(*words: int) -> int:
    """64 well-mixed bits of 64-bit words (negative ones wrap): the randomness of everything drawn here."""
    packed = struct.pack(f"<{len(words)}Q", *(word & (2**64 - 1) for word in words))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


FEISTEL_ROUNDS = 6


def permuted(index: int, size: int, key: int) -> int:
    """Where ``index`` goes in the ``key``-th shuffle of ``range(size)``, without building the shuffle.

    A Feistel network over the next power of four, walked until it lands inside: at most 4 steps on average.

    >>> sorted(permuted(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key, turn, right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def check_split(split: str) -> None:
    """Raises ValueError for anything but 'train' and 'heldout'."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: use one of {', '.join(SPLITS)}.")
