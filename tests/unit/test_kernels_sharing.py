"""Which rows kernels of decode_attention take together, and how what they find is merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode_attention.sharing import merged, num_parts, share


def test_by_hand():
    # Rows 0, 2, 3, 5 and 6 see prompt 1, row 4 prompt 0, and row 1 nothing; two at a time. By prompt: 4 | 0 2, 3 5, 6.
    entries, seen = jnp.array([1, 1, 1, 1, 0, 1, 1]), jnp.array([1, 0, 1, 1, 1, 1, 1], bool)
    parts = share(entries, seen, 2, 2)
    assert parts.order.tolist() == [4, 0, 2, 3, 5, 6, 1]
    assert parts.count.tolist() == [1, 2, 2, 1, 0]  # 7 // 2 + 2 places
    assert parts.entry.tolist()[:4] == [0, 1, 1, 1] and parts.first.tolist()[:4] == [0, 1, 3, 5]
    assert parts.members(2).tolist()[:4] == [[4, 4], [0, 2], [3, 5], [6, 6]]
    assert [parts.part.tolist()[b] for b in (0, 2, 3, 4, 5, 6)] == [1, 1, 2, 0, 2, 3]
    assert [parts.place.tolist()[b] for b in (0, 2, 3, 4, 5, 6)] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("most", [1, 3, 64])
def test_every_row_that_sees_a_prompt_is_in_one_part_of_it(most):
    rng = np.random.default_rng(most)
    run = jax.jit(share, static_argnums=(2, 3))
    for prompts in (1, 5, 40):
        entries, seen = rng.integers(0, prompts, 24), rng.random(24) < 0.8
        order, entry, first, count, part, place = map(np.asarray, run(entries, seen, prompts, most))
        assert len(entry) == num_parts(24, prompts, most) and (count <= most).all()
        found = np.concatenate([order[a : a + n] for a, n in zip(first, count, strict=True)])
        assert sorted(found) == np.flatnonzero(seen).tolist()
        for row in np.flatnonzero(seen):
            assert entry[part[row]] == entries[row]
            assert order[first[part[row]] + place[row]] == row and place[row] < count[part[row]]


def test_nobody_sees_a_prompt():
    parts = share(jnp.zeros(4, jnp.int32), jnp.zeros(4, bool), 3, 2)
    assert not parts.count.any()
    assert all(x.min() >= 0 and x.max() < 4 for x in (parts.members(2), parts.part))  # nothing lies outside


def test_merged_is_the_softmax_over_all():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(2, 3, 10)) * 4, rng.normal(size=(2, 10, 5))  # 2 rows of 3 heads, 10 positions
    whole = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) @ values
    averages, levels = [], []
    for cut in (slice(0, 4), slice(4, 9), slice(9, 10)):
        e = np.exp(scores[..., cut])
        averages.append(jnp.asarray(e / e.sum(-1, keepdims=True) @ values[:, cut]))
        levels.append(jnp.asarray(np.log2(e.sum(-1))))
    nothing = jnp.zeros_like(averages[0]), jnp.full_like(levels[0], -1e30)  # a part of no positions
    got = merged([*averages, nothing[0]], [*levels, nothing[1]], jnp.array([True, True]))
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-6)
    bad = [average.at[0].set(jnp.nan) for average in averages]
    got = merged(bad, levels, jnp.array([False, True]))
    assert not got[0].any()
    np.testing.assert_allclose(got[1], whole[1], rtol=1e-5, atol=1e-6)
