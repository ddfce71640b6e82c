"""Verdicts from killable processes: a broken verifier costs its own job, never the run, and is never a silent 0.

A thread a worker feeds it chunks of jobs and reads one message a job, so the job that runs now is known. Past its
deadline, or when the process dies, that job's verdict is invalid, the worker is replaced, and the rest of its chunk
goes back to the queue. Workers are started by ``exec``: this process has JAX's threads and locks, and must not fork.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import multiprocessing.connection
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from rl_reason.tasks.base import Problem, Verdict
from rl_reason.verifier_worker import LOADED, LOADING, READY, load_verifier

MAX_CHUNK = 64  # jobs
TARGET_CHUNK_S = 0.01  # seconds of work in a chunk: long against a message, short against a deadline
REAP_S = 5.0
LOAD_DEADLINE_S = 60.0  # for starting a worker and for importing a verifier, which no job's deadline pays for


class Job(typing.NamedTuple):
    """A completion to judge."""

    verifier: str  # a task's name, or "module:attribute"
    completion: str
    problem: Problem


def check_verifier(name: str) -> None:
    """Imports the verifier here and now.

    Raises:
        ValueError: naming the cure, when there is none or it cannot be called as verifiers are.
    """
    try:
        load_verifier(name)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"verifier {name!r} did not load: {type(error).__name__}: {error}") from error


class VerifierPool:
    """Scores jobs in ``num_workers`` processes, started when first needed. Any thread may call any method."""

    def __init__(
        self,
        num_workers: int,
        deadline_s: float,
        *,
        load_deadline_s: float = LOAD_DEADLINE_S,
        max_memory_bytes: int | None = None,
    ):
        """``deadline_s`` seconds a job from its start; ``max_memory_bytes`` of address space a worker, if any."""
        if num_workers < 1 or deadline_s <= 0 or load_deadline_s <= 0:
            raise ValueError(f"{num_workers=}, {deadline_s=}, {load_deadline_s=}: use at least 1, and more than 0 s.")
        self._num_workers, self._deadline_s, self._load_deadline_s = num_workers, deadline_s, load_deadline_s
        self._max_memory_bytes = max_memory_bytes or 0
        self._lock = threading.Condition()
        self._queue: collections.deque[_Entry] = collections.deque()
        self._threads: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._unloadable: dict[str, str] = {}  # verifiers whose import hung or killed a worker: once is enough
        self._closed = False

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def score(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs. A failed verifier's is ``Verdict(0.0, False, why)``.

        Raises:
            RuntimeError: when the pool is closed, or no worker can start.
        """
        return self.submit(jobs).result()

    def submit(self, jobs: Sequence[Job]) -> Future[list[Verdict]]:
        """Like ``score``, without waiting."""
        call = _Call(len(jobs))
        if not jobs:
            call.future.set_result([])
            return call.future
        entries = [_Entry(call, index, job.verifier, _pickled(job)) for index, job in enumerate(jobs)]
        with self._lock:
            if self._closed:
                raise RuntimeError("the verifier pool is closed; score before closing it.")
            self._start_threads()
            self._queue.extend(entries)
            self._lock.notify_all()
        return call.future

    def close(self) -> None:
        """Ends every worker, whatever it does; jobs without a verdict raise RuntimeError where they are waited for."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            self._lock.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        while self._queue:
            self._queue.popleft().call.fail(RuntimeError(_CLOSED))
        atexit.unregister(self.close)

    def _start_threads(self) -> None:
        if not self._threads:
            # Daemons: a pool left open must not keep the program from ending; atexit then closes it.
            names = [f"verifier-{number}" for number in range(self._num_workers)]
            self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)

    def _run(self) -> None:
        """One thread: chunks from the queue to a worker of its own."""
        worker: _Worker | None = None
        seconds_per_job: float | None = None
        while chunk := self._take(seconds_per_job):
            num_jobs = len(chunk)
            try:
                worker = worker or self._spawn()
                begin = time.monotonic()
                if not self._process(worker, chunk):
                    self._discard(worker)
                    worker = None
            except Exception as error:  # no worker, or our own mistake: whoever waits must hear of it
                if worker:  # it may still answer this chunk, which must not count for the next
                    self._discard(worker)
                    worker = None
                for entry in chunk:
                    entry.call.fail(error)
                continue
            seconds_per_job = (time.monotonic() - begin) / max(1, num_jobs - len(chunk))
            if chunk:  # what is left of it when a worker was lost
                with self._lock:
                    self._queue.extendleft(reversed(chunk))
                    self._lock.notify_all()
        if worker:
            self._discard(worker)

    def _take(self, seconds_per_job: float | None) -> list["_Entry"]:
        """The next chunk, of about TARGET_CHUNK_S and no more than this worker's share; empty once closed."""
        with self._lock:
            self._lock.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return []
            size = 1 if seconds_per_job is None else int(TARGET_CHUNK_S / max(seconds_per_job, 1e-9))
            share = -(-len(self._queue) // self._num_workers)
            return [self._queue.popleft() for _ in range(max(1, min(size, share, MAX_CHUNK)))]

    def _process(self, worker: "_Worker", chunk: list["_Entry"]) -> bool:
        """Scores entries and takes them off the front of ``chunk``; False: the worker is lost, and one job at most."""
        for entry in [entry for entry in chunk if entry.verifier in self._unloadable]:
            entry.call.set(entry.index, Verdict(0.0, False, self._unloadable[entry.verifier]))
            chunk.remove(entry)
        if not chunk:
            return True
        try:
            worker.send([entry.job for entry in chunk])
        except OSError:  # it died or got stuck while it had no job: no job's fault
            return False
        done, loading = 0, False
        try:
            while done < len(chunk):
                message = worker.receive(self._load_deadline_s if loading else self._deadline_s)
                if message in (LOADING, LOADED):
                    loading = message == LOADING
                    continue
                chunk[done].call.set(chunk[done].index, _verdict(message))
                done += 1
        except _LOST as error:
            if self._closed:  # close() killed it; that says nothing about the verifier
                del chunk[:done]
                return False
            why = f"verifier {chunk[done].verifier}: {self._why(worker, error, loading)}"
            if loading:
                self._unloadable[chunk[done].verifier] = why
            chunk[done].call.set(chunk[done].index, Verdict(0.0, False, why))
            del chunk[: done + 1]
            return False
        chunk.clear()
        return True

    def _why(self, worker: "_Worker", error: BaseException, loading: bool) -> str:
        what, deadline_s = ("import", self._load_deadline_s) if loading else ("verdict", self._deadline_s)
        if isinstance(error, TimeoutError | BlockingIOError):
            return f"no {what} within {deadline_s:g} s"
        if isinstance(error, EOFError | ConnectionError):
            return f"no {what}, its process died ({worker.cause_of_death()})"
        return f"no {what}, its process sent {error!r}"

    def _spawn(self) -> "_Worker":
        worker = _Worker(self._max_memory_bytes, self._load_deadline_s)
        with self._lock:
            self._workers.add(worker)
            if self._closed:  # between taking a chunk and now: nobody else would end it
                worker.kill()
        try:
            ready = worker.receive(self._load_deadline_s) == READY
        except _LOST:
            ready = False
        if ready:
            return worker
        said = worker.startup_errors()
        self._discard(worker)
        if self._closed:
            raise RuntimeError(_CLOSED)
        raise RuntimeError(
            f"a verifier process did not start within {self._load_deadline_s:g} s, or ended: "
            f"{said or 'it said nothing'}. Does `{sys.executable} -m rl_reason.verifier_worker` import? Is "
            "max_memory_bytes large enough to start Python and numpy?"
        )

    def _discard(self, worker: "_Worker") -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.close()


# Deadline and death are OSError and EOFError; the rest is what a verifier that writes to our socket makes of messages.
_LOST = (OSError, EOFError, ValueError, TypeError)
_CLOSED = "the verifier pool was closed before this verdict."


class _Call:
    """The verdicts of one ``submit``, filled in from several threads."""

    def __init__(self, size: int):
        self.future: Future[list[Verdict]] = Future()
        self._verdicts: list[Verdict | None] = [None] * size
        self._missing = size
        self._lock = threading.Lock()
        self.future.set_running_or_notify_cancel()  # a waiting caller cannot take jobs back

    def set(self, index: int, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[index] = verdict
            self._missing -= 1
            last = self._missing == 0
        if last and not self.future.done():
            self.future.set_result(typing.cast(list[Verdict], self._verdicts))

    def fail(self, error: Exception) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Entry:
    call: _Call
    index: int
    verifier: str
    job: bytes


def _verdict(message: bytes) -> Verdict:
    """JSON, not pickle: whatever ran over there, nothing executable comes back."""
    score, valid, why, parts = json.loads(message)
    return Verdict(score, valid, why, tuple((name, value) for name, value in parts))


def _pickled(job: Job) -> bytes:
    problem = job.problem
    return pickle.dumps((job.verifier, job.completion, (problem.task, problem.level, problem.data)))


class _Worker:
    """A process and a socket to it; used by one thread, but for ``kill``."""

    def __init__(self, max_memory_bytes: int, io_deadline_s: float):
        ours, theirs = socket.socketpair()
        # A worker that stops in the middle of a message must not hold us; poll alone sees whole messages only.
        timeval = struct.pack("ll", int(io_deadline_s) + 1, 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, timeval)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        arguments = (theirs.fileno(), os.getpid(), max_memory_bytes)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rl_reason.verifier_worker", *map(str, arguments)],
                env=_environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,  # so that kill also ends what a verifier started
            )
        except BaseException:
            ours.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
        self._pipe = multiprocessing.connection.Connection(ours.detach())
        self._lock = threading.Lock()  # over kill and wait: a process once waited for may share its number
        self._poll = select.poll()
        self._poll.register(self._pipe.fileno(), select.POLLIN)

    def send(self, jobs: Iterable[bytes]) -> None:
        self._pipe.send_bytes(pickle.dumps(list(jobs)))

    def receive(self, deadline_s: float) -> bytes:
        """The next message.

        Raises:
            TimeoutError: after ``deadline_s`` seconds. EOFError, OSError: when the process is gone.
        """
        if not self._poll.poll(deadline_s * 1000):
            raise TimeoutError
        return self._pipe.recv_bytes()

    def kill(self) -> None:
        """Ends the process and what it started, at once."""
        with self._lock:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """The killed process's exit code, minus the signal that ended it; None: the kernel holds on to it."""
        with self._lock, contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=REAP_S)
        return self._process.returncode

    def cause_of_death(self) -> str:
        """For a process that hung up. Killing it first changes nothing for one that is ending by itself."""
        self.kill()
        code = self.reap()
        if code is None or code == -signal.SIGKILL:
            return "SIGKILL: out of memory, or it closed its connection"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def close(self) -> None:
        self.kill()
        self.reap()
        self._pipe.close()
        self._stderr.close()

    def startup_errors(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()[-1000:].decode(errors="replace").strip()


def _environment() -> dict[str, str]:
    """Ours; what can be imported here can be there, and workers neither multiply threads nor take the accelerator."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return (
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | os.environ
        | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    )
