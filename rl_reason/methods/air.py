"""AIR: which instructions and which pairs of responses to learn preferences from (arXiv:2504.03612).

Three rules about scored responses: keep an instruction when the scores of different models' responses vary little; pair
responses whose scores differ by a little, not by a lot, the better of them good in absolute terms; take responses of the
policy's own and of other models about 1:1. One pair an instruction.

Departures: there is no public code. Among several pairs that qualify one is drawn at random, which keeps instructions
equally weighted; the mix is kept by preferring, at each instruction, the kind that the pairs so far have less of.

B instructions, M models, R responses an instruction. A score of NaN is missing. These run once over a data set.
"""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rl_reason.masked import masked_mean


class Candidates(typing.NamedTuple):
    """Ordered pairs of one instruction's responses; rows are the chosen, columns the rejected."""

    qualify: Bool[Array, "R R"]
    preferred: Bool[Array, "R R"]  # those to draw from: all that qualify, or of them the kind that is wanted


class Picks(typing.NamedTuple):
    """One pair an instruction, as columns of its responses; where ``found`` is False both are 0 and mean nothing."""

    chosen: Int[Array, "*B"]
    rejected: Int[Array, "*B"]
    found: Bool[Array, "*B"]


def instruction_keep(scores: Float[Array, "B M"], *, max_variance: float, ddof: int) -> Bool[Array, " B"]:
    """Whether an instruction's scores, one a model, have a variance of at most ``max_variance``.

    Over the scores that are there; fewer than two have no variance and the instruction is dropped. ``ddof`` 0 is the
    population's variance, 1 the unbiased one.
    """
    there = ~jnp.isnan(scores)
    centred = scores - masked_mean(scores, there, axis=-1)[:, None]
    count = there.sum(-1)
    variance = jnp.where(there, centred**2, 0.0).sum(-1) / jnp.maximum(count - ddof, 1)
    return (count >= 2) & (variance <= max_variance)


def select_pairs(
    scores: Float[Array, " R"],
    on_policy: Bool[Array, " R"],
    response_id: Int[Array, " R"],
    prefer_on_policy: Bool[Array, ""],
    *,
    min_margin: float,
    max_margin: float,
    min_chosen_score: float,
    mix_policies: bool,
) -> Candidates:
    """The pairs (i, j) with min_margin <= score_i - score_j <= max_margin and score_i >= min_chosen_score.

    Responses with equal ``response_id`` are the same text and never a pair, nor are missing scores. With ``mix_policies``
    the preferred pairs are those with the most responses of the policy's own, or with the fewest, as ``prefer_on_policy``
    says; without it all that qualify.

    Raises:
        ValueError: for a minimum margin that would let a response be its own or a better one's superior.
    """
    if not 0 < min_margin <= max_margin:
        raise ValueError(
            f"air: min_margin={min_margin}, max_margin={max_margin}; use 0 < min_margin <= max_margin, because a pair of "
            "equal scores has no chosen response."
        )
    margin = scores[:, None] - scores[None, :]  # NaN where a score is missing, and no comparison with NaN is true
    qualify = (margin >= min_margin) & (margin <= max_margin) & (scores[:, None] >= min_chosen_score)
    qualify &= response_id[:, None] != response_id[None, :]
    if not mix_policies:
        return Candidates(qualify, qualify)
    own = on_policy[:, None].astype(jnp.int32) + on_policy[None, :]
    wanted = jnp.where(prefer_on_policy, own, 2 - own)
    best = jnp.max(jnp.where(qualify, wanted, -1))
    return Candidates(qualify, qualify & (wanted == best))


def choose(preferred: Bool[Array, "R R"], key: Key[Array, ""]) -> Picks:
    """One of the preferred pairs, uniformly at random; none where there is none."""
    size = preferred.shape[0]
    # The largest of independent uniform numbers is anybody's.
    draw = jnp.where(preferred, jax.random.uniform(key, preferred.shape), -1.0)
    found = preferred.any()
    best = jnp.where(found, jnp.argmax(draw), 0).astype(jnp.int32)
    return Picks(best // size, best % size, found)


def pick(
    scores: Float[Array, "B R"],
    on_policy: Bool[Array, "B R"],
    response_id: Int[Array, "B R"],
    keep: Bool[Array, " B"],
    key: Key[Array, ""],
    *,
    min_margin: float,
    max_margin: float,
    min_chosen_score: float,
    mix_policies: bool,
) -> Picks:
    """At most one pair for each instruction that is kept; the hyperparameters are ``select_pairs``'.

    In order of instructions: each prefers responses of the policy's own while these are at most half of all in the pairs
    before it. Instruction b draws with fold_in(key, b).
    """

    def at(balance, rows):
        index, scores, on_policy, response_id, keep = rows
        candidates = select_pairs(
            scores,
            on_policy,
            response_id,
            balance <= 0,
            min_margin=min_margin,
            max_margin=max_margin,
            min_chosen_score=min_chosen_score,
            mix_policies=mix_policies,
        )
        picked = choose(candidates.preferred & keep, jax.random.fold_in(key, index))
        own = on_policy[picked.chosen].astype(jnp.int32) + on_policy[picked.rejected]
        return balance + jnp.where(picked.found, 2 * own - 2, 0), picked  # of the policy's own less of others'

    rows = (jnp.arange(len(scores)), scores, on_policy, response_id, keep)
    return jax.lax.scan(at, jnp.zeros((), jnp.int32), rows)[1]
