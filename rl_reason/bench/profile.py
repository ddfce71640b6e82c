"""Where a device's time goes: a trace of one call, and its kernels by name.

The trace itself is for XProf or Perfetto; what is counted here is of the first device.
"""

import pathlib
import re
import typing
from collections.abc import Callable, Iterator

import jax

Record = dict[str, typing.Any]


class Event(typing.NamedTuple):
    """What ran on a device; nanoseconds."""

    line: str | None  # the thread whose events may lie inside each other; None for a kernel, which holds no others
    name: str
    start: float
    duration: float


def profile(folder: pathlib.Path, calls: dict[str, Callable[[], typing.Any]]) -> dict[str, Record]:
    """Traces each call into ``folder/<name>``; says how long it took, the share of that in which kernels ran, and which.

    Raises:
        ValueError: a trace that lists nothing, as where the profiler cannot read this device.
    """
    found, options = {}, jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 0  # what a CPU runs is the host's
    for name, call in calls.items():
        where = folder / name
        with jax.profiler.trace(where, profiler_options=options):
            jax.block_until_ready(call())
        newest = max(where.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime, default=None)
        events = list(_events(jax.profiler.ProfileData.from_file(str(newest)))) if newest else []
        if not events:
            raise ValueError(f"{where} lists nothing that ran on {jax.devices()[0]}; leave --profile out.")
        found[name] = summary(events)
    return found


def summary(events: list[Event]) -> Record:
    """Seconds from the first start to the last end, the share of them in which anything ran, and the kernels that took
    most of it, each less what ran inside it on its line, as the body of a loop does. Numbers at the end of a name tell
    copies of a kernel apart, and are left out."""
    events = sorted(events, key=lambda event: (event.start, -event.duration))
    busy = end = 0.0
    open_on: dict[str, list[tuple[float, str]]] = {}  # by line what has not ended yet: until when, and its name
    spent: dict[str, list[float]] = {}  # by name: nanoseconds, calls
    for event in events:
        stop, name = event.start + event.duration, re.sub(r"([._]\d+)+$", "", event.name)
        busy += max(stop - max(event.start, end), 0.0)
        end = max(end, stop)
        if event.line is not None:
            around = open_on.setdefault(event.line, [])
            while around and around[-1][0] <= event.start:
                around.pop()
            if around:
                spent[around[-1][1]][0] -= event.duration
            around.append((stop, name))
        own = spent.setdefault(name, [0.0, 0])
        own[0], own[1] = own[0] + event.duration, own[1] + 1
    largest = sorted(spent.items(), key=lambda item: -item[1][0])
    kernels = [dict(name=name, seconds=own / 1e9, count=int(count)) for name, (own, count) in largest]
    span = end - events[0].start
    return dict(seconds=span / 1e9, busy=busy / max(span, 1.0), kernels=kernels)


def _events(data: typing.Any) -> Iterator[Event]:
    """Of a GPU its kernels, which may overlap, of a TPU its operations, and of a CPU those of all its threads."""
    kind = jax.default_backend()
    plane_name = "/host:CPU" if kind == "cpu" else f"/device:{kind.upper()}:0"
    lines = {"cpu": r"tf_XLA", "gpu": r"Stream", "tpu": r"XLA Ops"}[kind]
    for plane in data.planes:
        for line in plane.lines if plane.name == plane_name else ():
            for event in line.events if re.match(lines, line.name) else ():
                if kind != "cpu" or not re.search("::|^end: ", event.name):  # what its thread pools say of themselves
                    yield Event(None if kind == "gpu" else line.name, event.name, event.start_ns, event.duration_ns)
