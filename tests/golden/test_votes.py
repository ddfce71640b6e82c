"""Votes by hand: TTRL's majority, RLCCF's self-consistency weights, their ties; and when weighting helps or hurts."""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import voting
from rl_reason.methods import rlccf, ttrl

pytestmark = pytest.mark.usefixtures("no_rank_promotion")


def ids(*answers):
    return jnp.array(answers, jnp.int32)


# TTRL


def test_the_majority_answer_is_rewarded():
    # 7 twice of 4, 3 once, one sample without an answer: label 7, ratio 2/4.
    answers = ids(7, 7, -1, 3)
    assert ttrl.vote(answers).tolist() == [1, 1, 0, 0] == ttrl.vote(["7", "7", None, "3"]).tolist()
    assert int(ttrl.label(answers)) == 7 and float(ttrl.majority_ratio(answers)) == 0.5
    assert int(ttrl.label(["7", "7", None, "3"])) == 0  # by first appearance


def test_a_majority_is_of_those_that_answer():
    # Three of four have no answer: they are no class, and the one that answered wins with ratio 1/4.
    answers = ids(-1, -1, 4, -1)
    assert ttrl.vote(answers).tolist() == [0, 0, 1, 0] and float(ttrl.majority_ratio(answers)) == 0.25


def test_ties_go_to_the_answer_seen_first():
    # 9 and 2 twice each; 9 is seen first, though 2 is the smaller id and 2's second vote comes before 9's.
    answers = ids(9, 2, 2, 9, 5)
    assert ttrl.vote(answers).tolist() == [1, 0, 0, 1, 0] == ttrl.vote(["9", "2", "2", "9", "5"]).tolist()
    # 5 is seen before both but has one vote.
    assert int(ttrl.label(ids(5, 2, 9, 9, 2))) == 2


def test_nobody_answers():
    assert ttrl.vote(ids(-1, -1)).tolist() == [0, 0] == ttrl.vote([None, None]).tolist()
    assert int(ttrl.label(ids(-1, -1))) == -1 and float(ttrl.majority_ratio(ids(-1, -1))) == 0.0


def test_groups_are_apart():
    # The same ids mean nothing across groups.
    answers = ids([1, 1, 2], [2, 2, 1], [-1, 1, -1])
    assert ttrl.vote(answers).tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert ttrl.vote([[1, 1, 2], [2, 2, 1], [None, 1, None]]).tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert ttrl.label(answers).tolist() == [1, 2, 1]
    np.testing.assert_allclose(ttrl.majority_ratio(answers), [2 / 3, 2 / 3, 1 / 3])
    assert ttrl.vote([-1, -1, 3]).tolist() == [1, 1, 0]  # in a list of values -1 is an answer
    with pytest.raises(ValueError, match="fill the shorter ones up with None"):
        ttrl.vote([["1"], ["1", "2"]])


def counter_vote(group):
    """The authors' code: ``Counter.most_common(1)`` without the samples that have no answer."""
    voted = [a for a in group if a >= 0]
    best = collections.Counter(voted).most_common(1)
    return best[0] if best else (-1, 0)


def test_equals_a_counter_on_random_groups():
    rng = np.random.default_rng(0)
    answers = rng.integers(-1, 4, (2000, 7)).astype(np.int32)
    expected = [counter_vote(group.tolist()) for group in answers]
    assert jax.jit(ttrl.label)(answers).tolist() == [label for label, _ in expected]
    np.testing.assert_allclose(jax.jit(ttrl.majority_ratio)(answers), [count / 7 for _, count in expected], rtol=1e-6)
    reward = np.array([[a == label and a >= 0 for a in g] for g, (label, _) in zip(answers, expected, strict=True)])
    np.testing.assert_array_equal(jax.jit(ttrl.vote)(answers), reward)


# RLCCF

FOUR = [list("7777"), list("3359"), list("3382"), list("3456")]


def test_self_consistency_weights_the_vote():
    # SC: 4/4, 2/4, 2/4, 1/4. W(7) = 1 * 4 = 4; W(3) = .5 * 2 + .5 * 2 + .25 * 1 = 2.25: label 7.
    # Its four samples of sixteen are right: CC = 4/16. Plain counts are 7: 4, 3: 5, and 3 wins.
    answers = jnp.array([[int(a) for a in row] for row in FOUR])
    for label, rewards, weights in (rlccf.vote(FOUR), rlccf.vote(answers)):
        assert int(label) == 7 and weights.tolist() == [1.0, 0.5, 0.5, 0.25]
        assert rewards.tolist() == [[1] * 4, [0] * 4, [0] * 4, [0] * 4]
        assert float(rewards.mean()) == 0.25
    in_quarters = voting.tallies(answers, jnp.array([4, 2, 2, 1]))  # SC times K
    assert in_quarters[0, 0] / 4 == 4.0 and in_quarters[1, 0] / 4 == 2.25
    plain = rlccf.plain_vote(FOUR)
    assert plain.label == "3" and plain.weights.tolist() == [1.0] * 4 and float(plain.rewards.mean()) == 5 / 16
    # Each model's rewards are all equal: all advantages are 0, although the models disagree.
    assert (rlccf.vote(FOUR).rewards.std(-1) == 0).all()


def test_each_by_its_own_majority():
    # Majorities 7, 3, 3; of 3456 all tie and the smallest wins: 3. The label is the plain vote's.
    label, rewards, weights = rlccf.own_vote(FOUR)
    assert label == "3" and weights.tolist() == [1.0] * 4
    assert rewards.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    silent = rlccf.own_vote([[None, "2"], [None, None]])
    assert silent.label == "2" and silent.rewards.tolist() == [[0, 1], [0, 0]]


def test_batches_of_prompts():
    other = [list("1111"), list("1112"), [None] * 4, list("2222")]
    label, rewards, weights = rlccf.vote([FOUR, other])
    # other: SC 1, .75, 0, 1. W(1) = 4 + .75 * 3 = 6.25, W(2) = .75 + 4 = 4.75.
    assert label == ["7", "1"] and weights.tolist() == [[1.0, 0.5, 0.5, 0.25], [1.0, 0.75, 0.0, 1.0]]
    assert rewards[1].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    nobody = rlccf.vote([[None, None], [None, None]])
    assert nobody.label is None and not nobody.rewards.any() and not nobody.weights.any()
    assert int(rlccf.vote(ids([-1, -1], [-1, -1])).label) == -1


def test_samples_without_an_answer_stay_in_k():
    # SC of (5, none, none, none) is 1/4, not 1. W(5) = .25; W(8) = .5 * 2 = 1.
    label, rewards, weights = rlccf.vote(ids([5, -1, -1, -1], [8, 8, -1, 2]))
    assert int(label) == 8 and weights.tolist() == [0.25, 0.5]
    assert rewards.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


def test_ties_go_to_the_larger_support_then_to_the_first_in_order():
    # In units of 1/K. K = 3: a (9 9 4) has weight 2, b (4 4 6) weight 2, c (6 9 5) weight 1. W(9) = 2*2 + 1 = 5,
    # W(4) = 2*1 + 2*2 = 6, W(6) = 2 + 1 = 3: 4 wins, no tie.
    assert int(rlccf.vote(ids([9, 9, 4], [4, 4, 6], [6, 9, 5])).label) == 4
    # K = 4. a (2 2 9 5): weight 2; b (9 3 4 6): weight 1; c (9 7 8 1): weight 1. W(2) = 2*2 = 4;
    # W(9) = 2*1 + 1 + 1 = 4. Support: 2 has a alone, 2; 9 has a, b and c, 4: 9 wins over the smaller id.
    tied = ids([2, 2, 9, 5], [9, 3, 4, 6], [9, 7, 8, 1])
    assert int(rlccf.vote(tied).label) == 9
    assert rlccf.vote([[str(a) for a in row] for row in tied.tolist()]).label == "9"
    # Both tied: a (8 8), b (3 3): weights 2 and 2, tallies 4 and 4, supports 2 and 2. The smallest id, the first by str.
    assert int(rlccf.vote(ids([8, 8], [3, 3])).label) == 3
    assert rlccf.vote([["b", "b"], ["a", "a"]]).label == "a"
    assert rlccf.vote([[10, 10], [9, 9]]).label == 10  # "10" < "9"
    # Weights 2/3, 2/3, 1/3, which floats round: W(4) = 2*2 + 2*1 = 6 = W(1), supports 4 and 4, the smallest id.
    assert int(rlccf.vote(ids([4, 4, 1], [1, 1, 4], [0, 2, 3])).label) == 1


def reference_vote(answers, weighted):
    """The definition with exact integers, in units of 1/K, by loops."""
    count = [collections.Counter(a for a in model if a >= 0) for model in answers]
    weight = [max(c.values(), default=0) if weighted else 1 for c in count]
    tally, support = collections.Counter(), collections.Counter()
    for c, w in zip(count, weight, strict=True):
        for a, n in c.items():
            tally[a] += w * n
            support[a] += w
    return max(tally, key=lambda a: (tally[a], support[a], -a), default=-1)


@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_definition_on_random_groups(weighted):
    rng = np.random.default_rng(1)
    answers = rng.integers(-1, 5, (3000, 3, 4)).astype(np.int32)
    result = jax.jit(rlccf.vote if weighted else rlccf.plain_vote)(answers)
    expected = np.array([reference_vote(prompt.tolist(), weighted) for prompt in answers])
    np.testing.assert_array_equal(result.label, expected)
    np.testing.assert_array_equal(result.rewards, (answers == expected[:, None, None]) & (answers >= 0))


def test_one_model_alone_is_ttrl():
    """SC is then a common factor. On ties RLCCF takes the smallest id, which is TTRL's if ids are by first appearance."""
    rng = np.random.default_rng(2)
    answers = rng.integers(-1, 4, (2000, 6)).astype(np.int32)
    numbered = np.stack([voting.number([None if a < 0 else a for a in group.tolist()])[0] for group in answers])
    ttrl_rewards, vote = jax.jit(ttrl.vote)(answers), jax.jit(lambda x: rlccf.vote(x[:, None]).rewards[:, 0])
    np.testing.assert_array_equal(vote(numbered), ttrl_rewards)
    counts = np.stack([np.bincount(group[group >= 0], minlength=4) for group in answers])
    second, most = np.sort(counts, axis=1)[:, -2:].T
    untied = most > second
    assert 500 < untied.sum() < 1900
    np.testing.assert_array_equal(vote(answers)[untied], ttrl_rewards[untied])


# When weighting helps, and when it hurts; the set-up is ours. Three models, six samples each, four answers of which the last
# is right, so that no tie by order helps. The expectation is exact: a sum over all counts of all models.

SAMPLES, RIGHT = 6, 3
GUESSER = (0.3, 0.3, 0.3, 0.1)
SPECIALIST = (0.0, 0.1, 0.1, 0.8)
SURE_AND_WRONG = (0.95, 0.0, 0.0, 0.05)
FAIR = (0.1, 0.2, 0.2, 0.5)


def exact_accuracies(models):
    """P(label is right), weighted and plain: ties by support, then the smallest id."""
    counts = np.array([c for c in itertools.product(range(SAMPLES + 1), repeat=4) if sum(c) == SAMPLES])
    ways = np.array([math.factorial(SAMPLES) / math.prod(map(math.factorial, c)) for c in counts.tolist()])
    found = []
    for weights in (counts.max(1), np.ones(len(counts), np.int64)):
        tally, gave = weights[:, None] * counts, weights[:, None] * (counts > 0)
        score = tally * 1000 + gave
        total = score[:, None, None] + score[None, :, None] + score[None, None, :]
        right = np.argmax(total, axis=-1) == RIGHT  # the first of equals: the smallest id
        a, b, c = (ways * np.prod(np.array(p) ** counts, axis=1) for p in models)
        found.append(float(np.einsum("abc,a,b,c->", right, a, b, c)))
    return found


@pytest.mark.parametrize(
    "models, weighted, plain",
    [((SPECIALIST, GUESSER, GUESSER), 0.7197, 0.4658), ((SURE_AND_WRONG, FAIR, FAIR), 0.1700, 0.3997)],
    ids=["specialist", "sure and wrong"],
)
def test_weighting_helps_where_the_consistent_are_right_and_hurts_where_they_are_wrong(models, weighted, plain):
    exact = exact_accuracies(models)
    np.testing.assert_allclose(exact, [weighted, plain], atol=5e-5)
    rng, prompts = np.random.default_rng(3), 10_000
    answers = np.stack([rng.choice(4, (prompts, SAMPLES), p=p) for p in models], axis=1).astype(np.int32)
    for vote, expected in zip((rlccf.vote, rlccf.plain_vote), exact, strict=True):
        accuracy = float((jax.jit(vote)(answers).label == RIGHT).mean())
        assert abs(accuracy - expected) < 4 * math.sqrt(expected * (1 - expected) / prompts)
    assert abs(exact[0] - exact[1]) > 0.1


def test_rewards_are_more_accurate_than_labels_where_wrong_labels_are_rarely_matched():
    """TTRL's lucky hits: with a wrong label most samples get 0, which is what the verdict would have said."""
    rng, share = np.random.default_rng(4), (0.1,) * 7 + (0.3,)  # of many wrong answers none is likely
    answers = rng.choice(8, (4000, 3, 4), p=share).astype(np.int32)
    label, rewards, _ = jax.jit(rlccf.vote)(answers)
    label_accuracy = float((label == 7).mean())
    reward_accuracy = float(((rewards > 0) == (answers == 7)).mean())
    assert reward_accuracy > label_accuracy
