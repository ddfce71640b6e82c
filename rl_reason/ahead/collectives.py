"""Collectives of a compiled program, counted in its text: kinds, bytes a device hands over, and how often.

A collective counts as the larger of what it reads and what it gives on one device, in bytes, and as often as the loops
around it turn. Compiled loops of known length compare a counter with a constant (``lax.scan``, and XLA's own loops that
overlap products with permutes): their bodies are multiplied. Of a loop whose end depends on data one pass is counted; these
stand apart, by how many such loops are around them.
"""

import collections
import math
import re
import typing
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ALSO = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}  # the kind that each counts as
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # every other type has its bits in its name
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
)
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_FLAG = re.compile(r"\bu32\[\]")
_THROUGH = (
    "copy",
    "bitcast",
    "convert",
    "copy-start",
    "copy-done",
    "optimization-barrier",
)  # what keeps a scalar's value


Sizes = dict[tuple[str, int], float]  # bytes by kind and depth


class Traffic(typing.NamedTuple):
    """Bytes by kind on one device: ``[0]`` is a whole run of the program, ``[n]`` a single pass of n loops of unknown length
    that are within each other."""

    num_bytes: Sizes

    def of(self, depth: int) -> dict[str, float]:
        """Bytes of each kind, in KINDS' order, at a depth of open loops."""
        return {kind: self.num_bytes.get((kind, depth), 0.0) for kind in KINDS}

    @property
    def depth(self) -> int:
        """The most open loops that any collective is within."""
        return max((depth for _, depth in self.num_bytes), default=0)


class _Instruction(typing.NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


def num_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, without what a layout pads.

    >>> num_bytes("bf16[2,8]{1,0:T(8,128)(2,1)}"), num_bytes("(f32[4]{0}, pred[3], u32[]{:S(2)})"), num_bytes("s4[6]")
    (32, 23, 3)
    """
    bits = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        width = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
        bits += (width or 0) * math.prod(int(n) for n in dimensions.split(",") if n)
    return -(-bits // 8)


def traffic(text: str) -> Traffic:
    """What the entry computation of ``compiled.as_text()`` sends."""
    computations, entry = _computations(text)
    known: dict[str, Sizes] = {}

    def total(name: str) -> Sizes:
        if name not in known:
            found: Sizes = collections.defaultdict(float)
            for instruction in computations[name].values():
                _add(found, _own(instruction, computations[name]))
                for times, callee in _callees(instruction, computations):
                    _add(found, total(callee), times)
            known[name] = dict(found)
        return known[name]

    return Traffic(total(entry))


def _add(found: Sizes, more: Mapping[tuple[str, int], float], times: int | None = 1) -> None:
    """``times`` None is a loop of unknown length: one level deeper."""
    for (kind, depth), size in more.items():
        found[kind, depth + (times is None)] += size * (1 if times is None else times)


def _own(instruction: _Instruction, computation: Mapping[str, _Instruction]) -> Sizes:
    """What an instruction itself sends; an asynchronous one counts where it starts."""
    opcode = instruction.opcode.removesuffix("-start")
    kind = _ALSO.get(opcode, opcode)
    if kind not in KINDS:
        return {}
    reads = sum(num_bytes(computation[name].shape) for name in instruction.operands if name in computation)
    gives = num_bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # its result lists operands and flags as well
        gives = num_bytes(_FLAG.sub("", instruction.shape)) - reads
    return {(kind, 0): float(max(reads, gives))}


def _callees(
    instruction: _Instruction, computations: Mapping[str, Mapping[str, _Instruction]]
) -> Iterator[tuple[int | None, str]]:
    """(how often, which computation) that an instruction runs; of the branches of a conditional, all."""
    if instruction.opcode == "while":
        of = lambda word: _NAME.search(instruction.attributes.split(f"{word}=", 1)[1])[1]  # type: ignore[index]
        condition, body = of("condition"), of("body")
        times = _trips(instruction, computations[condition], computations[body])
        yield times, condition
        yield times, body
        return
    for match in _CALLED.finditer(instruction.attributes):
        rest = instruction.attributes[match.end() :]
        names = rest[: rest.index("}")] if rest.startswith("{") else rest.split(",", 1)[0]
        for name in _NAME.findall(names):
            yield 1, name


def _trips(loop: _Instruction, condition: Mapping[str, _Instruction], body: Mapping[str, _Instruction]) -> int | None:
    """How often a loop turns: from 0, or the constant that it starts at, by the body's step to the condition's bound."""
    if counted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(counted[1])
    root = next(i for i in condition.values() if i.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, bound = (_source(condition, name) for name in root.operands)
    if counter is None or bound is None or counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore[index]
    stepped = _source(body, next(i for i in body.values() if i.root).operands[index])
    if stepped is None or stepped.opcode != "add":
        return None
    steps = [i for name in stepped.operands if (i := _source(body, name)) is not None and i.opcode == "constant"]
    return -(-_constant(bound) // _constant(steps[0])) if len(steps) == 1 else None


def _constant(instruction: _Instruction) -> int:
    return int(instruction.operands[0])


def _source(computation: Mapping[str, _Instruction], name: str) -> _Instruction | None:
    """The instruction that a scalar comes from, through copies."""
    found = computation.get(name)
    while found is not None and found.opcode in _THROUGH:
        found = computation.get(found.operands[0])
    return found


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Every computation's instructions by name, and the name of the entry."""
    found: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found[header[1]] = {}
            entry = header[1] if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith(" "):
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY.")
    return found, entry


def _instruction(line: str) -> _Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 1
    inside, attributes = rest[: end - 1], rest[end:]
    operands = tuple(_NAME.findall(inside)) if opcode != "constant" else (inside,)
    return _Instruction(name.lstrip("%"), shape, opcode, operands, attributes, root)


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the first."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"a parenthesis is open in {text[:80]!r}.")
