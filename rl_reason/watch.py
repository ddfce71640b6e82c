"""Noticing within seconds that another process of the run is gone, and saying which.

A collective whose peer is gone hangs or ends in traces that name nobody, and jax's own heartbeats take 100 s to abort. So
every process holds a TCP connection to process 0, over which nothing is said until one of them leaves; process 0 passes on
to all others what it hears. When a process dies, of whatever, its kernel closes the connection. When a host vanishes, its
kernel stops answering keep-alive probes. Nothing of this waits for Python at the other end: a process that compiles for
minutes, swaps or stands in a debugger is not taken for dead.
"""

import contextlib
import errno
import json
import os
import secrets
import selectors
import socket
import threading
import time
import typing
from collections.abc import Callable, Iterable, Mapping

import jax

from rl_reason import processes

MEET_S = 20.0  # for all connections to process 0
HELLO_S = 2.0  # for what is said first over one
PROBES = 4
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Meeting(typing.NamedTuple):
    """Where process 0 is to be met; its text is what it broadcasts."""

    who: str
    hosts: list[str]  # names and addresses, one of which others reach
    port: int
    token: str  # both sides show it, so that strangers who connect count for nothing


class Watch:
    """Waits in a thread for one of ``peers`` (connections, and who is at their other ends) to leave.

    When one leaves without being done, all others are told and ``on_lost(why)`` is called, in that thread and once; it is to
    end the process.
    """

    def __init__(self, own: str, peers: Mapping[socket.socket, str], on_lost: Callable[[str], None]):
        self._own, self._peers, self._on_lost = own, dict(peers), on_lost
        self._lock, self._left, self._stopped = threading.Lock(), False, False
        self._selector = selectors.DefaultSelector()
        for connection in self._peers:
            self._selector.register(connection, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def done(self) -> None:
        """Says goodbye, and goes on watching: others may still need this process."""
        self._tell("")

    def stop(self, why: str) -> None:
        """Tells all others to stop too, because this process does."""
        self._stopped = True
        self._tell(f"{self._own} stopped: {why}")

    def _tell(self, why: str) -> None:
        """The last that is said; what comes after it is left out."""
        with self._lock:
            if self._left:
                return
            self._left = True
            for connection in self._peers:
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps(why).encode())
                    connection.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        with self._selector as selector:
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    why = _last_words(typing.cast(socket.socket, key.fileobj), self._peers)
                    if why and not self._stopped:
                        self._tell(why)
                        return self._on_lost(why)


def _last_words(connection: socket.socket, peers: Mapping[socket.socket, str]) -> str:
    """Why the process at the other end left, or another one of which it knew; "" when it was done."""
    who = peers[connection]
    try:
        said = b"".join(iter(lambda: connection.recv(4096), b""))
    except OSError as error:
        if error.errno in UNREACHABLE:
            return f"{who} does not answer: its host is down or cut off"
        said = b""
    if not said:
        return f"{who} is gone without a word: killed, crashed or out of memory"
    return json.loads(said)


def meet(on_lost: Callable[[str], None], address: str | None, vanished_s: float) -> tuple[Watch, str]:
    """Connects all processes of the run to process 0, which all call this together; what is to be warned of, or "".

    Args:
        on_lost: see ``Watch``.
        address: that of process 0, if it was given; else it says by which others may reach it.
        vanished_s: seconds after which a host that answers nothing has vanished.
    """
    own = f"process {jax.process_index()} ({socket.gethostname()}, pid {os.getpid()})"
    listener = _listen() if processes.is_first() else None
    port = listener.getsockname()[1] if listener else 0
    text = json.dumps(Meeting(own, _own_addresses(), port, secrets.token_hex(16)))
    first = Meeting(*json.loads(processes.broadcast_text(text)))
    until = time.monotonic() + MEET_S
    if listener:
        with listener:
            peers = gather(listener, first.token, jax.process_count() - 1, until)
        missing = jax.process_count() - 1 - len(peers)
        lost = f"{missing} processes are not" if missing else ""
    else:
        hosts = [address.rpartition(":")[0].strip("[]")] if address else []
        connection = reach([*hosts, *first.hosts], first.port, first.token, own, until)
        peers = {connection: first.who} if connection else {}
        lost = "" if connection else f"process {jax.process_index()} is not"
    for connection in peers:
        keep_alive(connection, vanished_s)
    where = f"connected to port {first.port} of process 0, because of a firewall?"
    cost = "when a process dies, those find out by jax's heartbeats, after 100 s"
    return Watch(own, peers, on_lost), f"{lost} {where} {cost}." if lost else ""


def _listen() -> socket.socket:
    """On any free port, for IPv4 and IPv6 where there is both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_addresses() -> list[str]:
    """This host's name, and the address that it sends from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; an address of nobody (RFC 5737)
        return [socket.gethostname(), probe.getsockname()[0]]
    return [socket.gethostname()]


def gather(listener: socket.socket, token: str, count: int, until: float) -> dict[socket.socket, str]:
    """Accepts ``count`` connections that show the token, or as many as come; who is at their other ends."""
    peers: dict[socket.socket, str] = {}
    while len(peers) < count and (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            break
        connection.settimeout(HELLO_S)
        try:
            shown, who = json.loads(_line(connection))
            if shown != token:
                raise ValueError("a stranger")
            connection.sendall(f"{json.dumps(token)}\n".encode())
        except (OSError, ValueError, TypeError):
            connection.close()
            continue
        connection.settimeout(None)
        peers[connection] = who
    return peers


def reach(hosts: Iterable[str], port: int, token: str, own: str, until: float) -> socket.socket | None:
    """A connection to whoever knows the token on that port of one of the hosts; None where nobody is found."""
    for host in dict.fromkeys(hosts):
        left = until - time.monotonic()
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=max(left / 2, 0.1))
            connection.sendall(f"{json.dumps([token, own])}\n".encode())
            if json.loads(_line(connection)) == token:
                connection.settimeout(None)
                return connection
        except (OSError, ValueError):
            pass
        if connection:
            connection.close()
    return None


def _line(connection: socket.socket) -> bytes:
    """Up to the newline and no further: what follows is for whoever reads next."""
    line = bytearray()
    while (byte := connection.recv(1)) not in (b"\n", b"") and len(line) < 1000:
        line += byte
    return bytes(line)


def keep_alive(connection: socket.socket, vanished_s: float) -> None:
    """Has the kernel probe the other end's kernel, and end the connection when that is silent for so many seconds."""
    idle = max(int(vanished_s / 3), 1)
    every = max(int((vanished_s - idle) / PROBES), 1)
    options = dict(TCP_KEEPIDLE=idle, TCP_KEEPINTVL=every, TCP_KEEPCNT=PROBES, TCP_USER_TIMEOUT=int(1000 * vanished_s))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
