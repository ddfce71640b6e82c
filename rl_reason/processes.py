"""What differs when a run has several processes: joining, who writes, whose rows are whose, and agreeing."""

import contextlib
import itertools
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

JOIN_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
CURE = (
    "set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0), "
    "or --coordinator, --num_processes and --process_id"
)
LOOK_S = 10.0  # how long a file that another host wrote may take to be seen; network file systems cache


def join(given: Mapping[str, str], timeout_s: float, give_up: Callable[[str], None]) -> str | None:
    """Joins the run's other processes, by values for JOIN_BY or, without any, by what jax finds out on a pod or under Slurm.

    ``give_up`` is called from another thread when they have not all come after ``timeout_s`` seconds, and has to end the
    process: jax itself would abort. Returns the address of process 0, where it was given.

    Raises:
        ValueError: a part of JOIN_BY is missing or makes no sense, there is nothing to go by, or process 0 cannot listen.
    """
    if not given:
        with _at_most(
            timeout_s, lambda: give_up(f"this cluster's processes have not all come within {timeout_s:g} s")
        ):
            try:
                jax.distributed.initialize(initialization_timeout=_beyond(timeout_s))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"--distributed: no cluster that jax knows ({error}); {CURE}.") from error
        return None
    address, count, own = _checked(given)
    with _at_most(timeout_s, lambda: give_up(_who_is_late(address, count, own, timeout_s))):
        try:
            jax.distributed.initialize(
                address,
                count,
                own,
                cluster_detection_method="deactivate",
                initialization_timeout=_beyond(timeout_s),
            )
        except RuntimeError as error:
            raise ValueError(
                f"--distributed: process {own} cannot use {address} ({error}); is the port free?"
            ) from error
    return address


def _checked(given: Mapping[str, str]) -> tuple[str, int, int]:
    """(address of process 0, number of processes, own number)."""
    if missing := [name for name in JOIN_BY if name not in given]:
        raise ValueError(f"--distributed: {', '.join(missing)} not given; {CURE}.")
    address, count, own = (given[name] for name in JOIN_BY)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and count.isdecimal() and own.isdecimal() and int(own) < int(count)):
        raise ValueError(f"--distributed: {', '.join(f'{k}={given[k]}' for k in JOIN_BY)} make no sense; {CURE}.")
    return address, int(count), int(own)


@contextlib.contextmanager
def _at_most(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _beyond(timeout_s: float) -> int:
    """A timeout for jax that ours is always before."""
    return int(timeout_s) + 600


def _who_is_late(address: str, count: int, own: int, timeout_s: float) -> str:
    """Whether it is process 0 that did not come."""
    within = f"within {timeout_s:g} s; start the same command on every host, or raise --join_timeout_s"
    if own:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError as error:
            return f"process {own} of {count} cannot reach process 0 at {address} ({error}) {within}"
    return f"process {own} of {count} waits at {address}, but not all of the others have come {within}"


def is_first() -> bool:
    """Whether this process writes the files and prints."""
    return jax.process_index() == 0


def local_rows(sharding: NamedSharding, num_rows: int, axis: int = 0) -> range:
    """The rows of a global batch that live on this process's devices.

    Raises:
        ValueError: when they are not one run of rows; order the mesh's devices by process.
    """
    shape = [1] * axis + [num_rows]
    pieces = [index[axis] for index in sharding.addressable_devices_indices_map(tuple(shape)).values() if index]
    bounds = sorted({piece.indices(num_rows)[:2] for piece in pieces})
    if any(a[1] != b[0] for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"This process holds the rows {bounds}; order the mesh's devices by process.")
    return range(bounds[0][0], bounds[-1][1])


def to_global(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Global arrays from each process's own rows (numpy)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def to_host(tree: PyTree) -> PyTree:
    """Whole numpy arrays on every process; one transfer."""
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, rows) of which this process holds the first replica: each row has one owner over all processes."""
    shards = [s for s in x.addressable_shards if s.replica_id == 0]
    if not shards:
        return np.zeros(0, np.int64), np.zeros((0, *x.shape[1:]), x.dtype)
    index = [np.arange(*s.index[0].indices(x.shape[0])) for s in shards]
    order = np.argsort(np.concatenate(index), kind="stable")
    return np.concatenate(index)[order], np.concatenate([np.asarray(s.data) for s in shards])[order]


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """Elementwise sum of one array a process, the same on all."""
    if jax.process_count() == 1:
        return x
    return np.asarray(multihost_utils.process_allgather(x)).sum(0)


def every_process(flag: bool) -> bool:
    """Whether all processes say so; all must ask together."""
    return not any_process(not flag)


def broadcast_text(text: str) -> str:
    """The first process's text, on all."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    buffer = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded)))), np.uint8)
    if not buffer.size:
        return ""
    if is_first():
        buffer[:] = encoded
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes().decode()


def blind_to(directory: pathlib.Path) -> list[int]:
    """The processes that do not see what process 0 writes into a directory: it is not on storage that all share."""
    if jax.process_count() == 1:
        return []
    sign = directory / broadcast_text(f".seen-by-all-{secrets.token_hex(8)}")
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
        sign.touch()
    multihost_utils.sync_global_devices(sign.name)
    until = time.monotonic() + LOOK_S
    while not (seen := sign.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    found = np.asarray(multihost_utils.process_allgather(np.asarray(seen)))
    if is_first():
        sign.unlink()
    return np.flatnonzero(~found).tolist()


def global_put(tree: PyTree, mesh: Mesh, spec) -> PyTree:
    """Host values that are the same on every process, as arrays of the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i, x=x: np.asarray(x)[i]), tree
    )
