"""What differs when a run has several processes: who writes, whose rows are whose, and agreeing."""

import itertools
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

JOIN_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins the run's other processes: by the environment's JOIN_BY, or by what jax finds out on a pod or under Slurm.

    Raises:
        ValueError: a part of JOIN_BY is missing or no number, or there is nothing to go by.
    """
    given = {name: os.environ[name] for name in JOIN_BY if name in os.environ}
    missing = [name for name in JOIN_BY if name not in given]
    cure = "set JAX_COORDINATOR_ADDRESS=HOST:PORT (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0)"
    if not given:
        try:
            return jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--distributed: no cluster that jax knows ({error}); {cure}.") from error
    if missing:
        raise ValueError(f"--distributed: the environment lacks {', '.join(missing)}; {cure}.")
    address, *numbers = given.values()
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--distributed: JAX_NUM_PROCESSES and JAX_PROCESS_ID are {numbers}; {cure}.")
    count, own = map(int, numbers)
    return jax.distributed.initialize(address, count, own, cluster_detection_method="deactivate")


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


def broadcast_text(text: str, limit: int = 4096) -> str:
    """The first process's text, on all."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(limit, np.uint8)
    encoded = text.encode()
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
    return received.tobytes().rstrip(b"\0").decode()


def global_put(tree: PyTree, mesh: Mesh, spec) -> PyTree:
    """Host values that are the same on every process, as arrays of the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i, x=x: np.asarray(x)[i]), tree
    )
