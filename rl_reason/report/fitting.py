"""Whether a step fits a slice: the record of ``experiments.compile`` on a terminal, and many of them as a table."""

import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import rich.box
import rich.table
import rich.text

from rl_reason.report.console import Display, duration, human

GIB = 2**30
STATE = ("parameters", "optimizer", "reference")
Record = Mapping[str, typing.Any]


def print_record(display: Display, record: Record) -> None:
    """What each program needs and sends on one device, and whether all of them fit."""
    out = display.console.print
    chip = "half a chip" if record["devices_per_chip"] > 1 else "a chip"
    out()
    out(rich.text.Text.assemble((record["config"], "bold"), f" on {record['slice']}"))
    out(rich.text.Text(f"{model(record)}; mesh {mesh(record)}", "dim"))
    out(rich.text.Text(record["plan"], "dim"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    out(rich.text.Text(f"compiled for it by {versions}; a device is {chip}", "dim"))
    for replaced in record["replaced"]:
        out(rich.text.Text(f"stands in for {replaced}", "dim"))
    box = rich.box.SIMPLE_HEAD if display.unicode else rich.box.ASCII2
    table = rich.table.Table(box=box, padding=(0, 0, 0, 2), pad_edge=False, show_edge=False)
    programs = record["programs"]
    table.add_column("GiB a device", no_wrap=True)
    for program in programs:
        table.add_column(program["name"], justify="right", no_wrap=True)
    for row in rows_of(record):
        if row is None:
            table.add_section()
        else:
            style = "bold" if row[0] == "total" else ""
            table.add_row(rich.text.Text(row[0]), *row[1:], style=style)
    out(table)
    out(verdict(display, record))
    for lever in record["levers"]:
        out(rich.text.Text(f"  {lever}"))


def rows_of(record: Record) -> Iterator[tuple[str, ...] | None]:
    """(what, its value in each program) line by line; None is a rule. What is 0 everywhere has no line."""
    programs = record["programs"]
    for name in programs[0]["bytes"]:
        if any(program["bytes"][name] for program in programs):
            yield name, *(gib(program["bytes"][name]) for program in programs)
    yield None
    yield "total", *(f"{'>' if program['refused'] else ''}{gib(program['total_bytes'])}" for program in programs)
    yield f"of {gib(record['hbm_bytes'])}", *(share(program["total_bytes"], record) for program in programs)
    deepest = max((len(program["sent_bytes"]) for program in programs), default=0)
    for depth in range(deepest):
        sent = [program["sent_bytes"][depth] if depth < len(program["sent_bytes"]) else {} for program in programs]
        kinds = [kind for kind in next(filter(None, sent)) if any(of.get(kind, 0) >= 1 for of in sent)]
        if kinds:
            yield None
            yield f"sent, {_times(programs, depth)}", *("" for _ in programs)
            yield from ((f"  {kind}", *(gib(of.get(kind, 0.0)) for of in sent)) for kind in kinds)
    yield None
    yield "compiled in", *(duration(program["seconds"]) for program in programs)


def _times(programs: Sequence[Record], depth: int) -> str:
    if depth == 0:
        return "a step"
    names = {program["loops"][depth - 1] for program in programs if len(program["loops"]) >= depth}
    return f"a {' or '.join(sorted(names)) or 'pass of an open loop'}"


def verdict(display: Display, record: Record) -> rich.text.Text:
    """One line: whether it fits, and the program that decides."""
    largest = next(program for program in record["programs"] if program["name"] == record["largest"])
    used = f"{largest['name']} needs {gib(largest['total_bytes'])} of {gib(record['hbm_bytes'])} GiB"
    if record["fits"]:
        return rich.text.Text.assemble((display.glyph("✓", "ok"), "green"), f" fits: {used}")
    cure = "What would help, most first:" if record["levers"] else "Take a larger slice."
    return rich.text.Text.assemble((display.glyph("✗", "error:"), "red"), f" does not fit: {used}. {cure}")


def markdown(records: Iterable[Record]) -> Iterator[str]:
    """A line of a Markdown table for each record: what the program that needs most holds, and what a step sends."""
    head = ("config", "model", "slice", "mesh", "parameters", "optimizer", "reference", "KV cache", "other", "total")
    head += ("of", "sent a step", "a decode step", "compiled in")
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for record in records:
        most = next(program for program in record["programs"] if program["name"] == record["largest"])
        cache = max(program["bytes"]["KV cache"] for program in record["programs"])
        held = [most["bytes"][name] for name in STATE]
        sent = sum(sum(program["sent_bytes"][0].values()) for program in record["programs"] if program["sent_bytes"])
        cells = [f"`{record['config']}`", model(record), f"`{record['topology']}`", mesh(record), *map(gib, held)]
        cells += [gib(cache), gib(most["total_bytes"] - sum(held)), gib(most["total_bytes"])]
        cells += [share(most["total_bytes"], record), gib(sent), gib(decoding(record))]
        cells += [duration(sum(program["seconds"] for program in record["programs"]))]
        yield f"| {' | '.join(cells)} |"


def decoding(record: Record) -> float:
    """Bytes that a device sends for one decode step: a pass of the rollout's loop has several."""
    for program in record["programs"]:
        if "check" in " ".join(program["loops"]) and len(program["sent_bytes"]) >= len(program["loops"]) + 1:
            return sum(program["sent_bytes"][len(program["loops"])].values()) / record["check_every"]
    return 0.0


def model(record: Record) -> str:
    """'Qwen2.5-7B, 7.62G parameters in bfloat16, stored as float32'."""
    active = "" if record["active_params"] == record["params"] else f" ({human(record['active_params'])} active)"
    stored = "" if record["dtype"] == record["param_dtype"] else f", stored as {record['param_dtype']}"
    name = record["tokenizer"].rpartition("/")[2]
    return f"{name}: {human(record['params'])} parameters{active} in {record['dtype']}{stored}"


def mesh(record: Record) -> str:
    """'fsdp=32 tensor=4'; axes of size 1 are left out."""
    return " ".join(f"{axis}={size}" for axis, size in record["mesh"].items()) or "one device"


def gib(num_bytes: float | int) -> str:
    """Two digits after the point, three where that would be nothing.

    >>> gib(1.5 * 2**30), gib(2**20), gib(0)
    ('1.50', '0.001', '0')
    """
    value = num_bytes / GIB
    return f"{value:.2f}" if value >= 0.01 else f"{value:.3f}" if value >= 0.0005 else "0"


def share(num_bytes: float | int, record: Record) -> str:
    """'13 %' of a device's memory."""
    return f"{100 * num_bytes / record['hbm_bytes']:.0f} %"
