"""How processes find each other, and whether they share a directory; real ones are in tests/e2e/test_processes.py."""

import socket

import numpy as np
import pytest

from rl_reason import processes
from tests.e2e.harness import free_port


def by(address="host0:1234", count="2", own="1"):
    given = zip(processes.JOIN_BY, (address, count, own), strict=True)
    return {name: value for name, value in given if value is not None}


def never(why):
    raise AssertionError(why)


@pytest.mark.parametrize(
    "given, named",
    [
        (by(address=None), "JAX_COORDINATOR_ADDRESS not given"),
        (by(count=None, own=None), "JAX_NUM_PROCESSES, JAX_PROCESS_ID not given"),
        (by(address="host0"), "JAX_COORDINATOR_ADDRESS=host0, "),
        (by(address=":1234"), "JAX_COORDINATOR_ADDRESS=:1234, "),
        (by(address="host0:http"), "JAX_COORDINATOR_ADDRESS=host0:http, "),
        (by(count="two"), "JAX_NUM_PROCESSES=two, "),
        (by(own="-1"), "JAX_PROCESS_ID=-1 "),
        (by(own="2"), "JAX_PROCESS_ID=2 "),
    ],
)
def test_half_an_address_is_refused_with_the_cure(given, named):
    with pytest.raises(ValueError, match=r"JAX_COORDINATOR_ADDRESS=HOST:PORT .* --coordinator") as refused:
        processes.join(given, 1.0, never)
    assert named in str(refused.value)


def test_who_is_late():
    address = f"127.0.0.1:{free_port()}"
    assert f"process 3 of 4 cannot reach process 0 at {address}" in processes._who_is_late(address, 4, 3, 60.0)
    assert "process 0 of 4 waits" in processes._who_is_late(address, 4, 0, 60.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        late = processes._who_is_late(address, 4, 3, 60.0)
    assert "not all of the others have come within 60 s" in late and "--join_timeout_s" in late


@pytest.fixture
def two(monkeypatch, tmp_path):
    """The second of two processes, or the first; what it says is all that the other one is told."""
    sign = tmp_path / "shared" / ".seen"
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast_text", lambda _: sign.name)
    monkeypatch.setattr(processes.multihost_utils, "sync_global_devices", lambda _: None)
    monkeypatch.setattr(processes, "LOOK_S", 0.1)
    return sign


def test_a_directory_that_others_do_not_see_is_found_out(monkeypatch, two):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda seen: np.array([True, bool(seen)]))
    assert processes.blind_to(two.parent) == [1]
    two.parent.mkdir()
    two.touch()
    assert processes.blind_to(two.parent) == []


def test_the_first_process_leaves_nothing_behind(monkeypatch, two):
    def all_look(seen):
        assert seen and two.exists()
        return np.array([True, True])

    monkeypatch.setattr(processes, "is_first", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", all_look)
    assert processes.blind_to(two.parent) == []
    assert list(two.parent.iterdir()) == []


def test_one_process_shares_everything_with_itself(tmp_path):
    assert processes.blind_to(tmp_path / "not made") == []
    assert not (tmp_path / "not made").exists()
