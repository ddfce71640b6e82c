"""A run on several hosts: the flags that join its processes, and one fate for all of them.

The same command is started on every host. When one process stops by an error or is gone, all stop, and each says which
it was, what was saved last and how to go on.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
import traceback
import types
import typing
from collections.abc import Iterator, Mapping

from absl import flags

from rl_reason.report.rundir import RunDir, flatten

JOIN_S, SILENT_S = 60.0, 30.0
GRACE_S = 2.0  # a dead peer also breaks collectives: how long whoever fails waits to hear that it was that
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
ROOT = pathlib.Path(__file__).parents[1]

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join other processes: those of --coordinator, or of the environment, or as the cluster says.",
)
_JOIN_BY = {
    "JAX_COORDINATOR_ADDRESS": flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; default: JAX_COORDINATOR_ADDRESS."
    ),
    "JAX_NUM_PROCESSES": flags.DEFINE_integer("num_processes", None, "How many; default: JAX_NUM_PROCESSES."),
    "JAX_PROCESS_ID": flags.DEFINE_integer("process_id", None, "Which is this one, from 0; default: JAX_PROCESS_ID."),
}
_JOIN_TIMEOUT = flags.DEFINE_float(
    "join_timeout_s", JOIN_S, "Seconds that processes wait for each other at the start."
)
_PEER_TIMEOUT = flags.DEFINE_float("peer_timeout_s", SILENT_S, "Seconds after which a silent host counts as gone.")


class Aftermath:
    """What is to be said of the run when it ends before its time."""

    run: RunDir | None = None  # once there is one

    def __str__(self) -> str:
        if self.run is None:
            return "Nothing is lost: start all processes again."
        steps = [path.name.removeprefix("step_") for path in self.run.checkpoints.glob("step_*")]
        saved = max((int(step) for step in steps if step.isdigit()), default=None)
        kept = "nothing was saved yet" if saved is None else f"step {saved} was saved last"
        return f"In {self.run.path} {kept}. Go on, with as many processes as you like, by\n  {resuming(self.run.path)}"


def resuming(run: pathlib.Path) -> str:
    """This very command, going on with the run; of a flag that is given twice the last counts."""
    more = [f"--run={run}", "--resume"]
    return shlex.join(["python", "-m", "experiments.run", *(w for w in sys.argv[1:] if w not in more), *more])


class Joining(typing.NamedTuple):
    """How processes find each other, and how long they wait."""

    given: Mapping[str, str] = types.MappingProxyType({})  # by JOIN_BY's names, before what the environment says
    timeout_s: float = JOIN_S
    silent_s: float = SILENT_S


def asked() -> Joining | None:
    """What the flags say; None for a run of one process."""
    given = {name: str(flag.value) for name, flag in _JOIN_BY.items() if flag.value is not None}
    return Joining(given, _JOIN_TIMEOUT.value, _PEER_TIMEOUT.value) if _DISTRIBUTED.value or given else None


@contextlib.contextmanager
def joined(joining: Joining | None, asked_for: Mapping[str, typing.Any], aftermath: Aftermath) -> Iterator[None]:
    """With the run's other processes, where there are to be any: whoever stops by an error stops all, also those that hang.

    Raises:
        SystemExit: nothing says how to join them, or process 0 was asked for something else.
    """
    if joining is None:
        yield
        return
    from rl_reason import processes, watch

    by = {name: os.environ[name] for name in processes.JOIN_BY if name in os.environ} | dict(joining.given)
    try:
        address = processes.join(by, joining.timeout_s, lambda why: leave(f"error: {why}."))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    on_lost = lambda why: leave(f"error: {why.rstrip('.')}. This process stops too.", aftermath)
    watching, unwatched = watch.meet(on_lost, address, joining.silent_s)
    if unwatched:
        print(f"warning: {unwatched}", file=sys.stderr)
    try:
        refuse_differences(facts_of(asked_for))
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            _stop(watching, end.code.removeprefix("error: "), end.code)
        watching.done()  # all end together, having agreed to
        raise
    except BaseException as error:
        _stop(watching, f"{type(error).__name__}: {error}", traceback.format_exc())
    watching.done()


def _stop(watching: typing.Any, why: str, text: str) -> typing.NoReturn:
    """Ends all processes because of an error in this one. Was it the end of another? Then the watch ends this one first."""
    time.sleep(GRACE_S)
    watching.stop(why)
    leave(text)


def leave(*words: object) -> typing.NoReturn:
    """Ends the process, from any thread, without what waits for others at a regular end."""
    sys.stdout.flush()
    shown = "\x1b[?25h" if sys.stdout.isatty() else ""  # a progress bar hides the cursor
    for text in (shown, *words):  # one by one: what the last says may be on a disk that does not answer
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
    os._exit(1)


def facts_of(asked_for: Mapping[str, typing.Any]) -> dict[str, str]:
    """What has to be the same in all processes: code, packages, and what they were asked for."""
    import jax

    digest = hashlib.sha256()
    for file in sorted(path for room in ("kernels", "rl_reason") for path in (ROOT / room).rglob("*.py")):
        digest.update(file.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = {**asked_for, "source": digest.hexdigest()[:12], "python": python, **versions}
    return {key: repr(value) for key, value in flatten(facts | {"backend": jax.default_backend()}).items()}


def refuse_differences(facts: Mapping[str, str]) -> None:
    """All processes call this together.

    Raises:
        SystemExit: where this one's differ from the first one's.
    """
    from rl_reason import processes

    first = json.loads(processes.broadcast_text(json.dumps(dict(facts))))
    there, here = ({**dict.fromkeys([*first, *facts], "absent"), **own} for own in (first, facts))
    rows = [f"{key} is {here[key]} here, {there[key]} in process 0" for key in here if here[key] != there[key]]
    if rows:
        raise SystemExit(
            f"error: {'; '.join(rows)}. Start the same command with the same code and packages on every host."
        )
