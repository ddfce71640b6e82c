"""RLCCF: several policies are rewarded for agreeing with their collective vote (arXiv:2508.12338).

    SC_n = count of model n's most common answer / K
    W(a) = sum_n SC_n count_n(a),   label = argmax W,   r_nk = 1[a_nk = label],   CC = mean r

Model n then takes a GRPO step on its own K samples with r_n; labels are constants (``loop/cohort.py``).

The paper publishes no code and leaves open what follows; all of it is ours: a sample without an answer casts no vote, gets
0 and stays in K; ties go to the answer with the highest summed weight of the models that gave it, each counted once, then to
the first in order: the smallest id, or for values the first by ``str``. Tallies are kept in units of 1/K, integers, so
that ties are exact.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rl_reason import voting
from rl_reason.voting import Answers


class Vote(typing.NamedTuple):
    """What a vote gives, a prompt each."""

    label: typing.Any  # ids [*b], -1 when nobody answers; or values, None when nobody answers
    rewards: Float[Array, "*b M K"]
    weights: Float[Array, "*b M"]  # SC_n; or 1, of a plain vote


def vote(answers: Answers) -> Vote:
    """The self-consistency weighted vote of M models with K samples each.

    ``answers`` are ids [*b M K] with -1 for none, or nested lists of values with None for none.

    >>> label, rewards, weights = vote([["7", "7"], ["3", "5"]])
    >>> label, rewards.tolist(), weights.tolist()
    ('7', [[1.0, 1.0], [0.0, 0.0]], [1.0, 0.5])
    """
    ids, values = _ids(answers)
    samples = ids.shape[-1]
    weights = voting.counts(ids).max(-1)
    label = _label(ids, weights)
    return Vote(_named(label, values), _rewards(ids, label), weights / samples)


def plain_vote(answers: Answers) -> Vote:
    """The same with all weights 1: what the weighting is compared with."""
    ids, values = _ids(answers)
    weights = jnp.ones(ids.shape[:-1], jnp.int32)
    label = _label(ids, weights)
    return Vote(_named(label, values), _rewards(ids, label), weights.astype(float))


def own_vote(answers: Answers) -> Vote:
    """Each model is rewarded by its own majority (TTRL, a model each); the label is the plain vote of all."""
    ids, values = _ids(answers)
    plain = plain_vote(ids)
    own = _label(ids[..., None, :], jnp.ones((*ids.shape[:-1], 1), jnp.int32))
    return Vote(_named(plain.label, values), voting.agreeing(ids, own).astype(float), plain.weights)


def _label(answers: Int[Array, "*b M K"], weights: Int[Array, "*b M"]) -> Int[Array, "*b"]:
    """The id of largest tally; of those the one of largest support; of those the smallest; -1 when nobody answers."""
    gave = voting.counts_by_voter(answers) > 0
    support = (gave * weights[..., None, None, :]).sum(-1)
    best = answers >= 0
    for score in (voting.tallies(answers, weights), support):
        score = jnp.where(best, score, -1)
        best &= score == score.max((-2, -1), keepdims=True)
    never = jnp.iinfo(answers.dtype).max
    smallest = jnp.where(best, answers, never).min((-2, -1))
    return jnp.where(best.any((-2, -1)), smallest, -1)


def _rewards(answers: Int[Array, "*b M K"], label: Int[Array, "*b"]) -> Float[Array, "*b M K"]:
    return voting.agreeing(answers, jnp.broadcast_to(label[..., None], answers.shape[:-1])).astype(float)


def _ids(answers: Answers) -> tuple[Int[Array, "*b M K"], list[typing.Any] | None]:
    """Ids, and what they stand for: values are numbered in the order of ``str``, of their type's name if that is equal."""
    if isinstance(answers, (jax.Array, np.ndarray)):
        return jnp.asarray(answers), None
    ids, values = voting.number(answers, by=lambda value: (str(value), type(value).__name__))
    return jnp.asarray(ids), values


def _named(label: Int[Array, "*b"], values: list[typing.Any] | None) -> typing.Any:
    """Labels as values, nested as the prompts were."""
    if values is None:
        return label
    name = np.array([*values, None], dtype=object)  # id -1 is the last
    return name[np.asarray(label)].tolist() if label.ndim else name[int(label)]
