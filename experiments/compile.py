"""python -m experiments.compile --config=clipcov.py:paper [--topology=v5p:4x4x4 | --search=v5p] [--out=FILE.jsonl]

The real TPU compiler over every program of a step, on a machine without a TPU: what each needs on a device, what it sends to
the others, and how long it took to compile. Nothing is allocated; needs libtpu (``pip install "jax[tpu]"``).

Exits with 1 when the step does not fit, and says what would help. Without --topology the config's own is taken. --search
finds the smallest slice of a generation that fits. --table=FILE.jsonl writes what --out gathered as a table in Markdown.
"""

import json
import os
import pathlib
import sys
import typing
from collections.abc import Mapping

from absl import app, flags

from experiments import config_files

_TOPOLOGY = flags.DEFINE_string("topology", None, 'A slice, such as "v5p:4x4x4"; default: config.topology.')
_SEARCH = flags.DEFINE_string(
    "search", None, "A generation (v5e, v5p, v6e, tpu7x): find its smallest slice that fits."
)
_OUT = flags.DEFINE_string("out", None, "A .jsonl file whose line for this config and slice is added or replaced.")
_TABLE = flags.DEFINE_string("table", None, "Print the table of such a file, and compile nothing.")
ENVIRONMENT = {  # for a TPU compiler without a TPU; none of it says for which slice
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

Record = Mapping[str, typing.Any]


def main(argv: list[str]) -> None:
    """Compiles and prints; whatever the user can mend ends in a message that starts "error:"."""
    if argv[1:]:
        raise SystemExit(f"error: unexpected {argv[1]!r}; write --name=value.")
    if _TABLE.value:
        from rl_reason.report.fitting import markdown

        path = pathlib.Path(_TABLE.value)
        if not path.exists():
            raise SystemExit(f"error: --table={path}: no such file; compile with --out={path} first.")
        print("\n".join(markdown(read(path))))
        return
    config = config_files.checked(config_files.CONFIG.value)
    if _TOPOLOGY.value and _SEARCH.value:
        raise SystemExit("error: --topology names one slice and --search tries many; give one of them.")
    config_files.prepare_host()
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value if name == "JAX_PLATFORMS" else os.environ.get(name, value)
    from rl_reason.ahead.memory import RefusedError
    from rl_reason.data.stream import ExampleError
    from rl_reason.report.console import Display

    display = Display()
    name = config_files.name_of(config_files.resolved(sys.argv))
    try:
        fits = found_by_search(display, config, name) if _SEARCH.value else checked(display, config, name)
    except (ValueError, OSError, ExampleError, RefusedError) as error:
        raise SystemExit(f"error: {error}") from error
    sys.exit(int(not fits))


def checked(display: typing.Any, config: typing.Any, name: str) -> bool:
    """One slice: whether the step fits."""
    from rl_reason.ahead import check

    topology = _TOPOLOGY.value or config.topology
    if not topology:
        raise ValueError(
            'config.topology is empty: say for which slice, as in --topology="v5p:4x4x4", or --search=v5p finds one.'
        )
    found = check.check(config, topology, lambda program: display.phase(f"compile {program}"))
    return shown(display, {"config": name, **check.record(found)})


def found_by_search(display: typing.Any, config: typing.Any, name: str) -> bool:
    """Slices from the smallest on: whether one of them fits."""
    from rl_reason.ahead import check

    for topology, found in check.search(
        config, _SEARCH.value or "", lambda program: display.phase(f"compile {program}")
    ):
        if isinstance(found, str):
            display.info(f"{topology}: passed over: {found}")
        elif shown(display, {"config": name, **check.record(found)}):
            return True
    display.warn(f"{name} fits no slice of {_SEARCH.value} that it divides over.")
    return False


def shown(display: typing.Any, record: Record) -> bool:
    """Prints a record, and keeps it where --out says."""
    from rl_reason.report.fitting import print_record

    print_record(display, record)
    if _OUT.value:
        keep(pathlib.Path(_OUT.value), record)
    return record["fits"]


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file that ``keep`` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: pathlib.Path, record: Record) -> None:
    """Adds a record to a file, in the place of that of the same config and slice."""
    from rl_reason.report.files import write_atomic

    same = lambda other: (other["config"], other["topology"]) == (record["config"], record["topology"])
    records = [other for other in read(path) if not same(other)] + [record]
    records.sort(key=lambda record: (record["config"], record["topology"]))
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    app.run(main, flags_parser=config_files.parse)
