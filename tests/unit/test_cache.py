"""What runs share on disk: made once, whole or absent, and named by everything that made it."""

import jax.numpy as jnp
import numpy as np

from rl_reason import cache


def test_made_once(tmp_path):
    like, made = {"w": jnp.zeros(3)}, []

    def make():
        made.append(1)
        return {"w": jnp.arange(3.0)}

    first, second = (cache.read_or_make(tmp_path / "entry", like, make) for _ in range(2))
    assert (first.cached, second.cached, len(made)) == (False, True, 1)
    np.testing.assert_array_equal(second.tree["w"], [0, 1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]  # nothing unfinished is left


def test_a_damaged_entry_is_made_again(tmp_path):
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "junk").write_text("?")
    kept = cache.read_or_make(tmp_path / "entry", {"w": jnp.zeros(1)}, lambda: {"w": jnp.ones(1)})
    assert not kept.cached and float(kept.tree["w"][0]) == 1.0


def test_what_processes_do_not_share_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(cache.processes, "blind_to", lambda _: [1])
    for _ in range(2):
        kept = cache.read_or_make(tmp_path / "entry", {"w": jnp.zeros(1)}, lambda: {"w": jnp.ones(1)})
        assert not kept.cached and float(kept.tree["w"][0]) == 1.0
    assert not list(tmp_path.iterdir())


def test_names():
    name = cache.fingerprint({"a": 1}, ("cache.py",))
    assert name == cache.fingerprint({"a": 1}, ("cache.py",))
    assert (
        len({name, cache.fingerprint({"a": 2}, ("cache.py",)), cache.fingerprint({"a": 1}, ("cache.py", "tasks"))})
        == 3
    )
