"""RLPR: the reward is the policy's own probability of the reference answer after its reasoning (arXiv:2506.18254).

    B = mean_t p_t over the reference's tokens, put in the answer's place (rounded to bfloat16, as the authors' code does)
    A = the same without any reasoning, from the initial model, once
    R = (1 - c) max(0, B - A) + c fmt,  c = 0.1;  minus 1 where R != 0 and some ten words come ten times

and groups are kept whose standard deviation of R is at least beta times a running mean of it. Departures: the reference
keeps its own token ids (rl_reason/splice.py); words are split at ASCII blanks; surplus kept prompts are not cached.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rl_reason.masked import masked_mean, masked_sum, ranking_accuracy
from rl_reason.policy import full_marks, group_centred
from rl_reason.repetition import repeats
from rl_reason.splice import as_rollout, baseline_rows, splice_references
from rl_reason.tags import Format, Tokenizer
from rl_reason.types import Prompts, Rewards, Rollout

AGGREGATES = ("mean_probability", "mean_logprob", "likelihood", "geometric_mean")
ScoreLogprobs = Callable[..., Float[Array, "N T"]]  # (params, rollout): teacher-forced, on the completion_mask columns


def mean_probability(
    logprobs: Float[Array, "N T"], reference_mask: Bool[Array, "N T"], *, aggregate: str, round_to_bf16: bool
) -> Float[Array, " N"]:
    """mean_t p_t over the reference's tokens; 0 where there are none.

    ``aggregate`` names the authors' alternatives too: mean_logprob (nats), likelihood (the product) and geometric_mean.

    Raises:
        ValueError: another aggregate.
    """
    if aggregate == "mean_probability":
        value = masked_mean(jnp.exp(logprobs), reference_mask, axis=1)
    elif aggregate == "mean_logprob":
        value = masked_mean(logprobs, reference_mask, axis=1)
    elif aggregate == "likelihood":
        value = jnp.exp(masked_sum(logprobs, reference_mask, axis=1))
    elif aggregate == "geometric_mean":
        value = jnp.exp(masked_mean(logprobs, reference_mask, axis=1))
    else:
        raise ValueError(f"aggregate={aggregate!r}; there are {', '.join(AGGREGATES)}.")
    value = jnp.where(reference_mask.any(1), value, 0.0)
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7) if round_to_bf16 else value


def shaped(
    probability: Float[Array, " N"],
    baseline: Float[Array, " N"],
    formed: Bool[Array, " N"],
    repeated: Bool[Array, " N"],
    *,
    format_coef: float,
    repetition_penalty: float,
) -> Float[Array, " N"]:
    """(1 - c) max(0, B - A) + c fmt; minus the penalty where that is not 0 and the text repeats itself."""
    fmt = formed.astype(probability.dtype)
    total = (1 - format_coef) * jnp.maximum(probability - baseline, 0.0) + format_coef * fmt
    return jnp.where(repeated & (total != 0), total - repetition_penalty, total)


def reward(
    score: Float[Array, " N"],
    valid: Bool[Array, " N"],
    rollout: Rollout,
    prompts: Prompts,
    params: PyTree,
    tokenizer: Tokenizer,
    score_logprobs: ScoreLogprobs,
    *,
    think_open: str,
    think_close: str,
    answer_open: str,
    answer_close: str,
    pad_with_space: bool,
    aggregate: str,
    round_to_bf16: bool,
    format_coef: float,
    repetition_ngram: int,
    repetition_times: int,
    repetition_penalty: float,
) -> Rewards:
    """R of each row, from one more forward of the current policy over rows with the reference in the answer's place.

    B is 0, and R at most c, where a row has no well-formed answer, where the reference is empty, and where the spliced
    row is longer than a completion may be. Without a baseline in the prompts (``config.baseline``) A is 0. The verdict is
    ``correct`` and nothing else: it stays a metric, and only rows whose verifier failed are left out because of it.
    ``mean_probability_auc`` and ``likelihood_auc``: how often either ranks a right row above a wrong one, as in the paper.

    Raises:
        ValueError: prompts without references, or without an opening tag to find answers by.
    """
    form = Format(think_open, think_close, answer_open, answer_close)
    spliced, answer = splice_references(rollout, prompts, form, tokenizer, pad_with_space=pad_with_space)
    logprobs = jax.lax.stop_gradient(score_logprobs(params, as_rollout(spliced, rollout)))
    probability = mean_probability(
        logprobs, spliced.reference_mask, aggregate=aggregate, round_to_bf16=round_to_bf16
    ).astype(score.dtype)
    without = jnp.zeros_like(probability)
    if prompts.baseline is not None:
        without = prompts.baseline[rollout.prompt_id].astype(probability.dtype)
    repeated = repeats(
        rollout.tokens,
        rollout.completion_mask,
        tokenizer.piece_bytes,
        ngram=repetition_ngram,
        times=repetition_times,
    )
    total = shaped(
        probability,
        without,
        answer.formed,
        repeated,
        format_coef=format_coef,
        repetition_penalty=repetition_penalty,
    )
    correct = full_marks(score, valid)
    as_float = lambda x: x.astype(total.dtype)
    parts = dict(
        reference_probability=probability,
        baseline=without,
        format=as_float(answer.formed),
        repetition=as_float(repeated),
    )
    for name in ("mean_probability", "likelihood"):  # which of the two tells right from wrong better
        value = mean_probability(logprobs, spliced.reference_mask, aggregate=name, round_to_bf16=False)
        parts[f"{name}_auc"] = jnp.broadcast_to(ranking_accuracy(value, correct > 0, valid), total.shape)
    return Rewards(total=total, correct=correct, valid=valid, parts=parts)


def baseline(
    prompts: Prompts,
    rollout: Rollout,
    ref_params: PyTree,
    tokenizer: Tokenizer,
    score_logprobs: ScoreLogprobs,
    *,
    pad_with_space: bool,
    aggregate: str,
) -> Float[Array, " B"]:
    """A: the reference's probability straight after the prompt, without tags, unrounded; 0 for an empty reference.

    By the initial model, whatever the step: the authors' code scores each prompt once, at step 0, and keeps the number. The
    numbers are the same, and prompts need not be known beforehand; it costs a forward of one row a prompt.
    """
    rows = baseline_rows(prompts, tokenizer, width=rollout.tokens.shape[1], pad_with_space=pad_with_space)
    assert rows.reference_mask is not None
    logprobs = jax.lax.stop_gradient(score_logprobs(ref_params, rows))
    return mean_probability(logprobs, rows.reference_mask, aggregate=aggregate, round_to_bf16=False)


def filter_stats() -> dict[str, Array]:
    """What the filter remembers: the step at hand, its groups' deviations so far, the recorded steps, the running mean."""
    integers = ("rlpr_step", "rlpr_groups", "rlpr_recorded")
    floats = ("rlpr_std_sum", "rlpr_recorded_sum", "rlpr_std_ema")
    return {name: jnp.zeros((), jnp.int32) for name in integers} | {name: jnp.zeros(()) for name in floats}


def filter(
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"],
    stats: dict[str, PyTree],
    step: Int[Array, ""],
    *,
    beta: float,
    ema_decay: float,
    start_record_step: int,
    start_filter_step: int,
) -> tuple[Bool[Array, "B G"], dict[str, Array]]:
    """Keeps groups whose standard deviation of R (ddof 1, valid rows) is at least beta times its running mean.

    Steps count from 1. From ``start_record_step`` a step's mean deviation, over all groups that it sampled in however many
    rounds, is recorded; at ``start_filter_step`` the running mean begins as the mean of those (0 without any), and then
    ema <- ema_decay ema + (1 - ema_decay) * the previous step's mean. Before that every group is kept. Groups with
    a deviation that is not finite, or fewer than two valid rows, are no part of a mean, and dropped once there is a filter.
    """
    centred, count, _ = group_centred(rewards, valid)
    variance = (centred**2).sum(-1) / jnp.maximum(count[:, 0] - 1, 1)
    std = jnp.where(count[:, 0] > 1, jnp.sqrt(variance), jnp.nan)
    finite = jnp.isfinite(std)

    now = (step + 1).astype(jnp.int32)
    before, groups, sofar = stats["rlpr_step"], stats["rlpr_groups"], stats["rlpr_std_sum"]
    recorded, recorded_sum, ema = stats["rlpr_recorded"], stats["rlpr_recorded_sum"], stats["rlpr_std_ema"]
    # On the first round of a step the previous one's groups are complete.
    turned = now != before
    mean = sofar / jnp.maximum(groups, 1)
    done = turned & (groups > 0)
    record = done & (before >= start_record_step) & (before < start_filter_step)
    recorded = recorded + record
    recorded_sum = recorded_sum + jnp.where(record, mean, 0.0)
    follow = done & (before >= start_filter_step)
    ema = jnp.where(follow, ema_decay * ema + (1 - ema_decay) * mean, ema)
    begins = turned & (now >= start_filter_step) & (before < start_filter_step)
    ema = jnp.where(begins, recorded_sum / jnp.maximum(recorded, 1), ema)

    wide = (std >= beta * ema) | (now < start_filter_step)
    changed = {
        "rlpr_step": now,
        "rlpr_groups": jnp.where(turned, 0, groups) + finite.sum(dtype=jnp.int32),
        "rlpr_std_sum": jnp.where(turned, 0.0, sofar) + masked_sum(std, finite),
        "rlpr_recorded": recorded,
        "rlpr_recorded_sum": recorded_sum,
        "rlpr_std_ema": ema,
    }
    return valid & wide[:, None], {name: x.astype(stats[name].dtype) for name, x in changed.items()}
