"""AIR's selection rules by hand, and the noise of a judge that they are an answer to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.data.preferences import judge_scores
from rl_reason.methods import air

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

AIR = dict(min_margin=2.0, max_margin=3.0, min_chosen_score=8.0, mix_policies=False)
NAN = float("nan")


def keep(scores, max_variance=1.5, ddof=0):
    return air.instruction_keep(jnp.array(scores, jnp.float32), max_variance=max_variance, ddof=ddof).tolist()


def test_instructions_of_low_variance_are_kept():
    # 8 9 8 9: mean 8.5, 4 * 0.25 / 4 = 0.25. 2 9 5 7: mean 5.75, squares 14.0625 10.5625 0.5625 1.5625, 26.75 / 4 = 6.6875.
    # 6 6 7 5: mean 6, 2 / 4 = 0.5.
    scores = [[8, 9, 8, 9], [2, 9, 5, 7], [6, 6, 7, 5]]
    assert keep(scores) == [True, False, True]
    for bound, expected in (
        (0.24, [0, 0, 0]),
        (0.25, [1, 0, 0]),
        (0.5, [1, 0, 1]),
        (6.68, [1, 0, 1]),
        (6.69, [1, 1, 1]),
    ):
        assert keep(scores, bound) == [bool(x) for x in expected]
    # ddof 1 divides by 3: 0.333333, 8.916667, 0.666667.
    for bound, expected in ((0.33, [0, 0, 0]), (0.34, [1, 0, 0]), (0.67, [1, 0, 1]), (8.92, [1, 1, 1])):
        assert keep(scores, bound, ddof=1) == [bool(x) for x in expected]


def test_missing_scores_are_left_out_of_the_variance():
    # 8 . 8 .: variance 0 of two. 8 alone and none: no variance. 2 . 9 .: mean 5.5, 24.5 / 2 = 12.25.
    assert keep([[8, NAN, 8, NAN], [8, NAN, NAN, NAN], [NAN] * 4, [2, NAN, 9, NAN]]) == [True, False, False, False]


def select(scores, on_policy=None, **changes):
    count = len(scores)
    return air.select_pairs(
        jnp.array(scores, jnp.float32),
        jnp.zeros(count, bool) if on_policy is None else jnp.array(on_policy, bool),
        **AIR | changes,
    )


def pairs(mask):
    return [tuple(pair) for pair in np.argwhere(np.asarray(mask)).tolist()]


def test_pairs_of_moderate_margin_and_good_chosen():
    # 9 7 6 10 3: margins of 2 or 3 are 9-7, 9-6, 10-7 and 6-3; in 6-3 the chosen one is below 8.
    scores = [9, 7, 6, 10, 3]
    assert pairs(select(scores).qualify) == [(0, 1), (0, 2), (3, 1)]
    assert pairs(select(scores, min_chosen_score=1.0).qualify) == [(0, 1), (0, 2), (2, 4), (3, 1)]
    assert pairs(select(scores, max_margin=2.0).qualify) == [(0, 1)]
    assert pairs(select(scores, min_margin=6.0, max_margin=9.0).qualify) == [(0, 4), (3, 4)]
    # Every ordered pair of unequal scores: the random arm.
    assert len(pairs(select(scores, min_margin=1.0, max_margin=9.0, min_chosen_score=1.0).qualify)) == 10


def test_equal_and_missing_scores_are_no_pairs():
    assert pairs(select([9, 9, 8]).qualify) == []
    assert pairs(select([9, NAN, 7, NAN]).qualify) == [(0, 2)]


def test_mixing_prefers_one_response_of_each_kind():
    # 10 9 8 7 6, the policy's own are 9 and 7. Pairs: 10-8, 10-7, 9-7, 9-6, 8-6; of both kinds are 10-7 and 9-6.
    scores, on_policy = [10, 9, 8, 7, 6], [False, True, False, True, False]
    mixed = select(scores, on_policy, mix_policies=True)
    assert pairs(mixed.preferred) == [(0, 3), (1, 4)]
    plain = select(scores, on_policy)
    assert pairs(mixed.qualify) == pairs(plain.qualify) == pairs(plain.preferred)
    assert pairs(plain.qualify) == [(0, 2), (0, 3), (1, 3), (1, 4), (2, 4)]
    # Where no pair is of both kinds, what qualifies is taken.
    assert pairs(select([9, 7, 6], [False] * 3, mix_policies=True).preferred) == [(0, 1), (0, 2)]
    assert pairs(select([5, 5], [True, False], mix_policies=True).preferred) == []


@pytest.mark.parametrize("margins", [(0.0, 3.0), (-1.0, 3.0), (3.0, 2.0)])
def test_margins_that_mean_nothing_are_refused(margins):
    with pytest.raises(ValueError, match="0 < min_margin <= max_margin"):
        select([9, 7], min_margin=margins[0], max_margin=margins[1])


def test_choosing_is_uniform_over_what_is_preferred():
    preferred = select([9, 7, 6, 10, 3]).preferred
    picks = jax.vmap(lambda key: air.choose(preferred, key))(jax.random.split(jax.random.key(0), 3000))
    assert picks.found.all()
    counts = {pair: 0 for pair in pairs(preferred)}
    for pair in zip(picks.chosen.tolist(), picks.rejected.tolist(), strict=True):
        counts[pair] += 1
    assert all(abs(count - 1000) < 110 for count in counts.values())  # 4 standard deviations, sqrt(3000 * 2 / 9) = 26
    none = air.choose(jnp.zeros((5, 5), bool), jax.random.key(0))
    assert (int(none.chosen), int(none.rejected), bool(none.found)) == (0, 0, False)


def test_picking_mixes_policies_and_respects_keep():
    # Each instruction has two pairs of one kind and two of both, 9-7 and 9-7 over the kinds.
    scores = jnp.tile(jnp.array([9.0, 7.0, 9.0, 7.0]), (8, 1))
    on_policy = jnp.tile(jnp.array([True, True, False, False]), (8, 1))
    ids = jnp.tile(jnp.arange(4), (8, 1))
    keep = jnp.ones(8, bool).at[3].set(False)
    mixed = AIR | dict(mix_policies=True)
    picks = air.pick(scores, on_policy, ids, keep, jax.random.key(0), **mixed)
    assert picks.found.tolist() == keep.tolist()
    kept = np.flatnonzero(keep)
    assert all(on_policy[b, picks.chosen[b]] != on_policy[b, picks.rejected[b]] for b in kept)
    # A pure function of the key; without mixing the kinds are as they fall.
    again = air.pick(scores, on_policy, ids, keep, jax.random.key(0), **mixed)
    jax.tree.map(np.testing.assert_array_equal, picks, again)
    free = air.pick(scores, on_policy, ids, keep, jax.random.key(1), **AIR)
    assert free.found.tolist() == keep.tolist()
    assert any(on_policy[b, free.chosen[b]] == on_policy[b, free.rejected[b]] for b in kept)


def test_a_text_that_was_scored_twice_is_no_pair_with_itself():
    # 9, 7 and 6, the first two the same text: it counts once, with its first score, so that 9-6 is the only pair.
    scores, own = jnp.array([[9.0, 7.0, 6.0]]), jnp.zeros((1, 3), bool)
    picks = air.pick(scores, own, jnp.array([[0, 0, 2]]), jnp.ones(1, bool), jax.random.key(0), **AIR)
    assert (picks.chosen.tolist(), picks.rejected.tolist()) == ([0], [2])


def flip_rate(margin, noise_std=1.0):
    """How often noise turns two scores around: their noises differ by N(0, 2 std^2), so Phi(-margin / (std sqrt 2))."""
    return 0.5 * math.erfc(margin / noise_std / 2)


def judged(quality):
    """P(score = 1..10) of a judge with noise 1: normal mass between half integers, the tails at the ends."""
    below = [0.0, *(0.5 * math.erfc((quality - k - 0.5) / math.sqrt(2)) for k in range(1, 10)), 1.0]
    return np.diff(below)


@pytest.mark.parametrize("margin, rate, rounded", [(1, 0.240, 0.257), (2, 0.079, 0.096), (3, 0.017, 0.025)])
def test_labels_flip_less_at_larger_margins(margin, rate, rounded):
    assert flip_rate(margin) == pytest.approx(rate, abs=5e-4)
    # The judge rounds, so that it ties too, half of which count as flips: a little worse. Summed over all pairs of scores:
    both = judged(5.0 + margin)[:, None] * judged(5.0)[None, :]
    exact = np.triu(both, 1).sum() + 0.5 * np.trace(both)
    assert exact == pytest.approx(rounded, abs=5e-4)
    better, worse = (
        judge_scores(jnp.full(40_000, quality), jax.random.key(seed), noise_std=1.0, failure_rate=0.0)
        for seed, quality in ((2, 5.0 + margin), (3, 5.0))
    )
    measured = float((better < worse).mean() + 0.5 * (better == worse).mean())
    assert measured == pytest.approx(exact, abs=0.009)  # 4 standard errors are at most 0.009
