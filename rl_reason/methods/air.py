"""AIR: which instructions and which pairs of responses to learn preferences from (arXiv:2504.03612).

Three rules about scored responses: keep an instruction when the scores of different models' responses vary little; pair
responses whose scores differ by a little, not by a lot, the better of them good in absolute terms; take responses of the
policy's own and of other models about 1:1. One pair an instruction.

Departures: there is no public code. Among several pairs that qualify one is drawn at random, which keeps instructions
equally weighted; the mix is kept by preferring pairs of one response of each kind.

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
    preferred: Bool[Array, "R R"]  # those to draw from: all that qualify, or of them those of both kinds


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
    *,
    min_margin: float,
    max_margin: float,
    min_chosen_score: float,
    mix_policies: bool,
) -> Candidates:
    """The pairs (i, j) with min_margin <= score_i - score_j <= max_margin and score_i >= min_chosen_score.

    Missing scores are in no pair. With ``mix_policies`` those are preferred that pair the policy's own response with one of
    another model, where there are any: whatever number of pairs is taken, the kinds are 1:1.

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
    mixed = qualify & (on_policy[:, None] != on_policy[None, :])
    return Candidates(qualify, jnp.where(mix_policies & mixed.any(), mixed, qualify))


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

    ``response_id`` is the column of the first response with the same text: a text counts once, with its first score, and is
    never paired with itself. Instruction b draws with fold_in(key, b).
    """
    first = response_id == jnp.arange(scores.shape[1])[None]

    def at(index, scores, on_policy, keep):
        candidates = select_pairs(
            scores,
            on_policy,
            min_margin=min_margin,
            max_margin=max_margin,
            min_chosen_score=min_chosen_score,
            mix_policies=mix_policies,
        )
        return choose(candidates.preferred & keep, jax.random.fold_in(key, index))

    return jax.vmap(at)(jnp.arange(len(scores)), jnp.where(first, scores, jnp.nan), on_policy, keep)
