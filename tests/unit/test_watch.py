"""Who is gone, and what the others hear of it: over the loopback interface, within milliseconds."""

import errno
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rl_reason import watch

SOON_S = 10.0  # on a busy machine

# A process of which nothing but its connection is known.
MEMBER = """
import json, socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(json.dumps(["token", "process 2"]).encode() + b"\\n")
connection.recv(100)
time.sleep(60)
"""


class Company:
    """Process 0 and others, each with its watch and a queue of what it was told."""

    def __init__(self, others: int):
        self.told = [queue.Queue() for _ in range(others + 1)]
        pairs = [socket.socketpair() for _ in range(others)]
        hub = {ours: f"process {number}" for number, (ours, _) in enumerate(pairs, start=1)}
        peers = [hub, *({theirs: "process 0"} for _, theirs in pairs)]
        self.sockets = [list(own) for own in peers]
        self.watches = [
            watch.Watch(f"process {number}", own, self.told[number].put) for number, own in enumerate(peers)
        ]

    def die(self, number: int) -> None:
        """It says nothing more, and its kernel closes its connections."""
        self.watches[number]._left = self.watches[number]._stopped = True
        for connection in self.sockets[number]:
            connection.shutdown(socket.SHUT_RDWR)

    def heard(self, number: int) -> str:
        return self.told[number].get(timeout=SOON_S)

    def close(self) -> None:
        for number, watching in enumerate(self.watches):
            self.die(number)
            watching.thread.join()
        for connection in itertools.chain(*self.sockets):
            connection.close()


@pytest.fixture
def company():
    made = Company(3)
    yield made
    made.close()


@pytest.mark.parametrize("dead", [0, 2])
def test_all_others_hear_who_is_gone(company, dead):
    company.die(dead)
    for number in {0, 1, 2, 3} - {dead}:
        assert company.heard(number).startswith(f"process {dead} is gone without a word")


@pytest.mark.parametrize("failed", [0, 2])
def test_all_others_hear_why_one_stopped_and_itself_nothing(company, failed):
    company.watches[failed].stop("no such file: a.jsonl")
    for number in {0, 1, 2, 3} - {failed}:
        assert company.heard(number) == f"process {failed} stopped: no such file: a.jsonl"
    time.sleep(0.05)
    assert company.told[failed].empty()


def test_who_is_done_may_go_but_hears_of_those_who_are_not(company):
    company.watches[1].done()
    company.die(1)
    company.watches[2].done()
    time.sleep(0.05)
    assert all(told.empty() for told in company.told)
    company.die(0)  # while it writes the report, say
    assert "process 0 is gone" in company.heard(2)
    assert "process 0 is gone" in company.heard(3)


def test_all_done_is_the_end(company):
    for watching in company.watches:
        watching.done()
    for number in range(4):
        company.die(number)
    time.sleep(0.05)
    assert all(told.empty() for told in company.told)


class GivenUp(socket.socket):
    """A connection that the kernel gave up."""

    error: OSError

    def recv(self, *_):
        raise self.error


@pytest.mark.parametrize(
    "number, why", [(errno.ETIMEDOUT, "its host is down or cut off"), (errno.ECONNRESET, "is gone without a word")]
)
def test_a_host_that_vanished_is_told_from_a_process_that_died(number, why):
    with GivenUp() as connection:
        connection.error = OSError(number, os.strerror(number))
        assert why in watch._last_words(connection, {connection: "process 1"})


def test_a_killed_process_is_noticed_and_a_stopped_one_is_not():
    listener, told = watch._listen(), queue.Queue()
    with listener, subprocess.Popen([sys.executable, "-c", MEMBER, str(listener.getsockname()[1])]) as process:
        peers = watch.gather(listener, "token", 1, time.monotonic() + SOON_S)
        assert list(peers.values()) == ["process 2"]
        for connection in peers:
            watch.keep_alive(connection, 1.0)
        watching = watch.Watch("process 0", peers, told.put)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(queue.Empty):
            told.get(timeout=2.5)  # longer than vanished_s: its kernel answers
        process.send_signal(signal.SIGKILL)
        assert "process 2 is gone without a word" in told.get(timeout=SOON_S)
        watching.thread.join()
        (connection,) = peers
        connection.close()


def test_strangers_who_connect_count_for_nothing():
    with watch._listen() as listener:
        port = listener.getsockname()[1]
        found = {}
        until = time.monotonic() + SOON_S
        gathering = threading.Thread(target=lambda: found.update(watch.gather(listener, "token", 1, until)))
        gathering.start()
        for said in (b"", b"GET / HTTP/1.1\n", b"7\n", b'["another run", "process 1"]\n'):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
        assert watch.reach(["127.0.0.1"], port, "not the token", "process 1", time.monotonic() + SOON_S) is None
        # The first name leads nowhere; the second is the host.
        connection = watch.reach(["host.invalid", "127.0.0.1"], port, "token", "process 1", time.monotonic() + SOON_S)
        gathering.join()
        assert connection is not None and list(found.values()) == ["process 1"]
        (theirs,) = found
        with connection, theirs:
            watching = watch.Watch("process 1", {connection: "process 0"}, lambda why: None)
            watching.stop("at once")
            assert json.loads(theirs.recv(100)) == "process 1 stopped: at once"  # not lost with the greeting
            theirs.shutdown(socket.SHUT_WR)
            watching.thread.join()


def test_whoever_does_not_come_is_not_waited_for_for_ever():
    with watch._listen() as listener:
        began = time.monotonic()
        assert watch.gather(listener, "token", 2, began + 0.2) == {}
        assert time.monotonic() - began < SOON_S


def test_the_kernel_gives_a_silent_host_up_in_time():
    for vanished_s in (1.0, 30.0, 100.0):
        with socket.socket() as connection:
            watch.keep_alive(connection, vanished_s)
            option = lambda name, c=connection: c.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            silent = option("TCP_KEEPIDLE") + option("TCP_KEEPINTVL") * option("TCP_KEEPCNT")
            assert silent <= max(vanished_s, 5.0)
            assert option("TCP_USER_TIMEOUT") == 1000 * vanished_s
