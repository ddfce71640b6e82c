"""Votes: who gave the same answer, how often, and with what weight. In graph, and pure.

An answer is a class id: equal ids are one answer, -1 is none and never votes. Ids need neither order nor bound, because
classes are counted by pairwise equality, [K K] a group. Counts and tallies are integers, so that ties are exact.
"""

import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Ids [*b K], or nested lists of values: strings, numbers, None for no answer.
Answers = Int[Array, "..."] | Int[np.ndarray, "..."] | Sequence[typing.Any]


def same(answers: Int[Array, "*b K"]) -> Bool[Array, "*b K K"]:
    """Whether two samples of a group gave one answer; without an answer a sample agrees with none, itself included."""
    return (answers[..., :, None] == answers[..., None, :]) & (answers >= 0)[..., :, None]


def counts(answers: Int[Array, "*b K"]) -> Int[Array, "*b K"]:
    """How many samples of the group gave each sample's answer; 0 without one.

    >>> counts(jnp.array([7, 3, 7, -1])).tolist()
    [2, 1, 2, 0]
    """
    return same(answers).sum(-1)


def self_consistency(answers: Int[Array, "*b K"]) -> Float[Array, "*b"]:
    """Count of the most common answer / K; samples without an answer stay in K. 0 when nobody answers."""
    return counts(answers).max(-1) / answers.shape[-1]


def counts_by_voter(answers: Int[Array, "*b M K"]) -> Int[Array, "*b M K M"]:
    """How many of each voter's K samples gave each sample's answer: the last axis is the voter asked about."""
    voters, samples = answers.shape[-2:]
    pairs = same(answers.reshape(*answers.shape[:-2], voters * samples))
    return pairs.reshape(*answers.shape, voters, samples).sum(-1)


def tallies(answers: Int[Array, "*b M K"], weights: Int[Array, "*b M"]) -> Int[Array, "*b M K"]:
    """W(a) = sum_n weight_n count_n(a) of each sample's answer; 0 without one.

    >>> tallies(jnp.array([[7, 7], [3, 7]]), jnp.array([2, 1])).tolist()
    [[5, 5], [1, 5]]
    """
    return (counts_by_voter(answers) * weights[..., None, None, :]).sum(-1)


def agreement(a: Int[Array, "*b K"], b: Int[Array, "*b J"]) -> Float[Array, "*b"]:
    """Share of the K J pairs of samples that gave one answer; a sample without an answer agrees with none."""
    return ((a[..., :, None] == b[..., None, :]) & (a >= 0)[..., :, None]).mean((-2, -1))


def agreeing(answers: Int[Array, "*b K"], label: Int[Array, "*b"]) -> Bool[Array, "*b K"]:
    """Which samples gave the group's label; none where the label is -1."""
    return (answers == label[..., None]) & (answers >= 0)


def number(
    values: Sequence[typing.Any], by: Callable | None = None
) -> tuple[Int[np.ndarray, "..."], list[typing.Any]]:
    """Ids for nested lists of values, equal values one id, None -1; and the value of each id.

    Ids are by first appearance, or with ``by`` in the order of that key.

    Raises:
        ValueError: lists of unequal length.

    >>> number(["7", None, "3", "7"])[0].tolist(), number(["7", None, "3", "7"], by=str)[0].tolist()
    ([0, -1, 1, 0], [1, -1, 0, 1])
    """
    found: dict[typing.Any, int] = {}

    def visit(x):
        if isinstance(x, (list, tuple)):
            return [visit(y) for y in x]
        return -1 if x is None else found.setdefault(x, len(found))

    try:
        ids = np.array(visit(values), np.int32)
    except ValueError as error:
        raise ValueError("Groups of answers differ in length; fill the shorter ones up with None.") from error
    if by is None:
        return ids, list(found)
    ordered = sorted(found, key=by)
    rank = np.array([ordered.index(value) for value in found] + [-1], np.int32)  # the last is that of id -1
    return rank[ids], ordered


def ids_of(answers: Answers) -> Int[Array, "..."]:
    """Ids as they are; nested lists numbered by first appearance."""
    if isinstance(answers, (jax.Array, np.ndarray)):
        return jnp.asarray(answers)
    return jnp.asarray(number(answers)[0])
