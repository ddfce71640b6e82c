"""What crosses between devices, read from a compiled program's text."""

import collections
import re

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=\{?%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(")


def collectives(text: str) -> dict[tuple[int, str, str], tuple[int, int]]:
    """(while loops around, kind, shape) to (how many, bytes of the result of each on one device)."""
    starts = [(m.group(1), m.start()) for m in _COMPUTATION.finditer(text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    bodies = {name: text[start:end] for (name, start), end in zip(starts, ends, strict=True)}
    depth: dict[str, int] = {}

    def visit(name, loops):
        if name not in bodies or depth.get(name, -1) >= loops:
            return
        depth[name] = loops
        for line in bodies[name].splitlines():
            for called in _CALLED.findall(line):
                visit(called, loops + (" while(" in line))

    visit(next(m.group(1) for m in _COMPUTATION.finditer(text) if m.group(0).startswith("ENTRY")), 0)
    found: collections.Counter = collections.Counter()
    for name, loops in depth.items():
        for shape, kind in _COLLECTIVE.findall(bodies[name]):
            found[loops, kind, re.sub(r"\{[^}]*\}", "", shape)] += 1
    return {key: (count, _bytes(key[2])) for key, count in found.items()}


def _bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        size = SIZES.get(dtype, 4)
        for n in filter(None, sizes.split(",")):
            size *= int(n)
        total += size
    return total
