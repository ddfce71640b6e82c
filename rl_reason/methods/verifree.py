"""VeriFree: maximises the probability of the reference answer itself, through the reasoning too (arXiv:2505.21493).

    p_i  = exp(sum_t log pi(reference_t | prompt, reasoning_i))
    loss = mean_i [ -A_i sum_{t in reasoning} log pi_t - p_i sum_{t in reference} log pi_t ],   A_i = p_i - mean_{j != i} p_j

A (``rloo.advantages``) and p are constants; there is no ratio, no clip and no length normalisation:
``seq_mean_token_sum`` for both terms.
Departures from the authors' code: p and the second term are over the reference's own tokens, where theirs also counts
the frame around it (``> \\boxed{ } </answer>``); tokens that only spell a cut one anew get no loss; the last opening tag is
cut at, not the first.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from rl_reason.masked import masked_mean, masked_sum
from rl_reason.policy import full_marks
from rl_reason.splice import as_rollout, splice_references
from rl_reason.tags import Format, Tokenizer
from rl_reason.types import Metrics, Prompts, Rewards, Rollout


def reward(
    score: Float[Array, " N"],
    valid: Bool[Array, " N"],
    rollout: Rollout,
    prompts: Prompts,
    params: PyTree,
    tokenizer: Tokenizer,
    score_logprobs: Callable[..., Float[Array, "N T"]],
    *,
    answer_open: str,
    pad_with_space: bool,
) -> tuple[Rewards, Rollout]:
    """p of each row, and the rows to train on: cut behind the answer's opening tag, then reference and EOS.

    Their ``completion_mask`` is on what the policy sampled before the cut and on the reference, ``reference_mask`` on the
    latter. A row without the tag, without an end, with an empty reference or too long for one has p = 0 and stays as it is.
    The verdict is ``correct``, a metric.
    """
    form = Format("", "", answer_open, "")
    spliced, _ = splice_references(rollout, prompts, form, tokenizer, pad_with_space=pad_with_space)
    finished = ~rollout.truncated[:, None]
    choose = lambda new, old: jnp.where(finished, new, old)
    reference_mask = spliced.reference_mask & finished
    rows = dataclasses.replace(
        as_rollout(spliced, rollout),
        tokens=choose(spliced.tokens, rollout.tokens),
        completion_mask=choose(spliced.completion_mask, rollout.completion_mask),
        reference_mask=reference_mask,
    )
    logprobs = jax.lax.stop_gradient(score_logprobs(params, rows))
    # The sampler never drew the reference: what the policy says of it stands in, so that the two do not differ there.
    drawn = choose(spliced.sampled_mask, rollout.completion_mask)
    fill = lambda x: jnp.where(drawn, x, jnp.where(reference_mask, logprobs.astype(x.dtype), 0.0))
    rows = dataclasses.replace(
        rows,
        completion_mask=drawn | reference_mask,
        rollout_logprobs=fill(rollout.rollout_logprobs),
        sampled_logprobs=fill(rollout.sampled_logprobs),
    )
    total = jnp.exp(masked_sum(logprobs, reference_mask, axis=1)).astype(score.dtype)
    total = jnp.where(reference_mask.any(1), total, 0.0)
    as_float = lambda x: x.astype(total.dtype)
    parts = dict(reference_probability=total, format=as_float(reference_mask.any(1)))
    return Rewards(total=total, correct=full_marks(score, valid), valid=valid, parts=parts), rows


def objective(
    logprobs: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    rewards: Float[Array, " N"],
    completion_mask: Bool[Array, "N T"],
    reference_mask: Bool[Array, "N T"],
) -> tuple[dict[str, Float[Array, "N T"]], Metrics]:
    """{policy: -A log p on sampled tokens, reference: -p log p on the reference's}, each 0 on the other's tokens.

    Both are to be reduced over "completion": a row without a reference counts in the mean of either.
    """
    reference = completion_mask & reference_mask
    sampled = completion_mask & ~reference_mask
    losses = {
        "policy": jnp.where(sampled, -advantages * logprobs, 0.0),
        "reference": jnp.where(reference, -rewards[:, None] * logprobs, 0.0),
    }
    mean = masked_mean(jax.lax.stop_gradient(logprobs), reference)
    return losses, {"verifree/reference_logprob": mean}
