"""Slices of TPU pods that are not here, by name: "v5p:4x4x4" is a generation and the chips along each axis of its torus.

libtpu describes them and compiles for them on any machine; no chip is asked.
"""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import re
import typing

GIB = 2**30
CURE = 'pip install "jax[tpu]" installs it, on a machine without TPUs too'


class TopologyError(ValueError):
    """No such slice, or nothing to compile for it with."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip. A device is what jax counts: of tpu7x half a chip."""

    name: str
    hbm_bytes: int  # of a device that a program may use: the compiler's own limit, which is less than the data sheet's
    devices_per_chip: int
    slices: tuple[tuple[int, ...], ...]  # chips along each axis, smallest first; of those on offer, whole hosts


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)),
    *((4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16), (8, 16, 16), (16, 16, 16)),
)
# The limits are what libtpu 0.0.42 says when it refuses a program: 15.75, 95.74, 31.25 and 94.75 GiB.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v5e", round(15.75 * GIB), 1, _FLAT),
        Generation("v5p", round(95.74 * GIB), 1, _CUBES),
        Generation("v6e", round(31.25 * GIB), 1, _FLAT),
        Generation("tpu7x", round(94.75 * GIB), 2, _CUBES),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice that exists, and its devices as jax describes them."""

    name: str
    generation: Generation
    chips: int
    hosts: int
    devices: tuple[typing.Any, ...]
    libtpu: str  # the compiler's version

    def describe(self) -> str:
        """'v5p:4x4x4: 64 chips of 95.7 GiB on 16 hosts'."""
        each = self.generation.devices_per_chip
        memory = f"{self.generation.hbm_bytes / GIB:.1f} GiB"
        devices = f" ({each} devices each)" if each > 1 else ""
        of = f"{each} x {memory}" if each > 1 else memory
        return (
            f"{self.name}: {self.chips} chips of {of}{devices} on {self.hosts} {'hosts' if self.hosts > 1 else 'host'}"
        )


def parse(name: str) -> tuple[Generation, tuple[int, ...]]:
    """Generation and chips along each axis.

    Raises:
        TopologyError: naming the generations or the slices there are.

    >>> generation, shape = parse("v6e:4x8")
    >>> generation.name, shape
    ('v6e', (4, 8))
    """
    word, _, dimensions = name.partition(":")
    if word not in GENERATIONS:
        close = difflib.get_close_matches(word, GENERATIONS, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise TopologyError(
            f"topology {name!r}: no generation {word!r}.{hint} There are {', '.join(GENERATIONS)}; a slice is written as "
            f"in {', '.join(map(str, examples()))}."
        )
    generation = GENERATIONS[word]
    axes = len(generation.slices[0])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dimensions) or dimensions.count("x") != axes - 1:
        raise TopologyError(
            f"topology {name!r}: want chips along {axes} axes, as in {word}:{written(generation.slices[2])}. "
            f"{offered(generation)}"
        )
    return generation, tuple(int(n) for n in dimensions.split("x"))


def written(shape: tuple[int, ...]) -> str:
    """'4x4x4'."""
    return "x".join(map(str, shape))


def examples() -> list[str]:
    """A slice of each generation."""
    return [f"{name}:{written(generation.slices[2])}" for name, generation in GENERATIONS.items()]


def offered(generation: Generation) -> str:
    """The slices of a generation, in a sentence."""
    return f"There are {generation.name}:{', '.join(map(written, generation.slices))}."


def find(name: str) -> Slice:
    """The slice of that name.

    Raises:
        TopologyError: there is none, or libtpu is missing or doesn't know it.
    """
    generation, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"topology {name!r}: the TPU compiler is in libtpu, which is not installed; {CURE}.")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:  # what libtpu raises is jax's, and not one type over its versions
        reason = str(error).splitlines()[0]
        raise TopologyError(f"topology {name!r}: libtpu refuses it: {reason}. {offered(generation)}") from error
    devices = tuple(description.devices)
    chips = math.prod(shape)
    assert len(devices) == chips * generation.devices_per_chip, (name, len(devices))
    hosts = len({device.process_index for device in devices})
    return Slice(name, generation, chips, hosts, devices, importlib.metadata.version("libtpu"))


def slices(generation: str) -> list[str]:
    """Names of a generation's slices, smallest first.

    Raises:
        TopologyError: no such generation.
    """
    found, _ = parse(generation if ":" in generation else f"{generation}:{_smallest(generation)}")
    return [f"{found.name}:{written(shape)}" for shape in found.slices]


def _smallest(generation: str) -> str:
    return written(GENERATIONS[generation].slices[0]) if generation in GENERATIONS else ""
