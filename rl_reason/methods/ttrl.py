"""TTRL: a group's majority answer stands in for the label (arXiv:2504.16084).

    y* = the most frequent answer of a prompt's samples,  r_k = 1[a_k = y*]

Ties go to the answer seen first in sample order, as ``Counter.most_common(1)`` of the authors' code has it. A sample without
an answer does not vote and gets 0, as in their second version. Departure: rewards are membership in the voted class; the
authors grade against its text, so that an answer outside the class can be rewarded too (0.5 where 1/2 won).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl_reason import voting
from rl_reason.policy import full_marks
from rl_reason.types import Prompts, Rewards
from rl_reason.voting import Answers


def reward(
    answers: Int[Array, " N"], score: Float[Array, " N"], valid: Bool[Array, " N"], prompts: Prompts
) -> Rewards:
    """``vote`` of each prompt's samples. The verdict is hidden from training: it is ``correct``, for metrics and audits.

    Parts: ``label_accuracy``, whether a sample that gave the label is right; ``reward_accuracy``, whether the reward is the
    verdict; ``majority_ratio``; ``answered``, whether a sample has an answer. A group that nobody answers gets 0 throughout,
    and so no advantage.
    """
    groups = answers.reshape(prompts.tokens.shape[0], -1)
    rewards = vote(groups)
    correct = full_marks(score, valid)
    by_label = jnp.where(rewards > 0, correct.reshape(groups.shape), 0.0).max(1, keepdims=True)
    spread = lambda x: jnp.broadcast_to(x, groups.shape).reshape(-1).astype(score.dtype)
    rewards = spread(rewards)
    parts = {
        "label_accuracy": spread(by_label),
        "reward_accuracy": (rewards == correct).astype(score.dtype),
        "answered": (answers >= 0).astype(score.dtype),
        "majority_ratio": spread(majority_ratio(groups)[:, None]),
    }
    return Rewards(total=rewards, correct=correct, valid=jnp.ones_like(valid), parts=parts)


def label(answers: Answers) -> Int[Array, "*b"]:
    """The id of each group's most frequent answer, -1 when nobody answers; lists are numbered by first appearance.

    >>> int(label(jnp.array([5, 3, -1, 3])))
    3
    """
    ids = voting.ids_of(answers)
    count = voting.counts(ids)
    winner = jnp.argmax(count, axis=-1)[..., None]  # the first of the largest: its answer is the one seen first
    chosen = jnp.take_along_axis(ids, winner, axis=-1)[..., 0]
    return jnp.where(count.max(-1) > 0, chosen, -1)


def vote(answers: Answers) -> Float[Array, "*b K"]:
    """1 for the samples that gave their group's most frequent answer, 0 for all others.

    ``answers`` are ids [*b K] with -1 for none, or nested lists of values with None for none. Nobody answers: all 0.

    >>> vote(["7", "7", None, "3"]).tolist()
    [1.0, 1.0, 0.0, 0.0]
    >>> vote([["1", "2"], [None, None]]).tolist()  # a tie: the first
    [[1.0, 0.0], [0.0, 0.0]]
    """
    ids = voting.ids_of(answers)
    return voting.agreeing(ids, label(ids)).astype(float)


def majority_ratio(answers: Answers) -> Float[Array, "*b"]:
    """Count of the most frequent answer / K, a group; samples without an answer stay in K.

    >>> float(majority_ratio(["7", "7", None, "3"]))
    0.5
    """
    return voting.self_consistency(voting.ids_of(answers))
