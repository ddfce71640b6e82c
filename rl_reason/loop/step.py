"""One RL step as pure functions; ``jax.lax.scan`` over ``make_step`` is the compiled loop.

The fused step and the split one (rollout | verifiers | update) are built of the same three functions, so they cannot
drift apart.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason import judging
from rl_reason import rollout as rollout_lib
from rl_reason.batch import in_pieces, split_strided
from rl_reason.loop import token_reward
from rl_reason.loop.demonstrations import demonstration_rows, join_groups
from rl_reason.loop.parts import Parts
from rl_reason.loop.update import Minibatch, ScoredRows, apply_gradient, loss_and_gradient, score_rows
from rl_reason.masked import masked_mean
from rl_reason.sampling import Sampling
from rl_reason.sharding import constrain_rows
from rl_reason.types import Metrics, Prompts, Rewards, Rollout, TrainState, Verdicts, struct

ROLLOUT, OBJECTIVE, SELECTION, REWARD = range(4)  # folded into the root key: one stream a purpose


@struct
class Sampled:
    """What one step shows of itself: the first groups' rollouts, for the logs."""

    tokens: Int[Array, "n T"]
    prompt_len: Int[Array, " n"]
    completion_mask: Bool[Array, "n T"]
    rollout_logprobs: Float[Array, "n T"]
    uid: Int[Array, " n"]
    truncated: Bool[Array, " n"]
    reward: Float[Array, " n"]
    correct: Float[Array, " n"]
    valid: Bool[Array, " n"]
    off_policy: Bool[Array, " n"]


def sample_phase(
    parts: Parts, state: TrainState, prompts: Prompts, sampling: Sampling
) -> tuple[Rollout, Int[Array, ""]]:
    """Draws the completions of a step, and joins demonstrations to their groups where the plan has any.

    Their randomness is their prompts' ``uid``s, so the step plays no part in it.
    """
    key = jax.random.fold_in(state.key, ROLLOUT)
    rollout, decode_steps = rollout_lib.generate(state.params, prompts, key, sampling, parts.model, parts.rollout)
    if copies := parts.plan.demonstrations:
        rollout = join_groups(rollout, demonstration_rows(prompts, copies, parts.rollout), parts.plan)
    return rollout, decode_steps


def reward_phase(
    parts: Parts, state: TrainState, prompts: Prompts, rollout: Rollout, verdicts: Verdicts, sampling: Sampling
) -> tuple[Rewards, Rollout]:
    """The reward slot; rows whose verifier failed stay invalid whatever it says."""
    reward = parts.slots["reward"]
    assert reward is not None

    def score_logprobs(params: PyTree, rollout: Rollout) -> Float[Array, "N T"]:
        rows = dict(tokens=rollout.tokens, prompt_len=rollout.prompt_len, row_mask=rollout.completion_mask)
        return _score_in_pieces(parts, params, ScoredRows(**rows), sampling.temperature)

    tools = dict(tokenizer=parts.tokenizer, score_logprobs=score_logprobs)
    if (baseline := parts.slots["baseline"]) is not None:
        offered = dict(prompts=prompts, rollout=rollout, ref_params=parts.reference(state)) | tools
        prompts = dataclasses.replace(prompts, baseline=baseline(offered))

    out = reward(
        dict(
            score=verdicts.score,
            valid=verdicts.valid,
            answers=verdicts.answers,
            rollout=rollout,
            prompts=prompts,
            params=state.params,
            ref_params=parts.reference(state),
            models=state.models,
            stats=state.stats,
            key=_step_key(state, REWARD),
            judges={
                name: functools.partial(
                    judging.ask,
                    judge,
                    state.models[name]["params"],
                    rollout,
                    prompts,
                    parts.plan.pieces_of(rollout.tokens.shape[0]),
                )
                for name, judge in parts.judges.items()
            },
            **tools,
        )
    )
    if isinstance(out, tuple):  # the rows are others now: experts recorded for the old ones mean nothing
        out = (out[0], dataclasses.replace(out[1], expert_ids=None))
    rewards, rollout = out if isinstance(out, tuple) else (out, rollout)
    return dataclasses.replace(rewards, valid=rewards.valid & verdicts.valid), rollout


def _with_sampled_statistics(rewards: Rewards, group_size: int) -> Rewards:
    groups = lambda x: x.reshape(-1, group_size)
    count = groups(rewards.valid).sum(1).astype(rewards.total.dtype)
    mean = masked_mean(groups(rewards.total), groups(rewards.valid), axis=1)
    spread = lambda x: jnp.repeat(x, group_size)
    return dataclasses.replace(rewards, sampled_mean=spread(mean), sampled_count=spread(count))


def _step_key(state: TrainState, purpose: int) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(state.key, purpose), state.step)


class Selected(typing.NamedTuple):
    """Rows that may be trained on, whole groups of train_group_size, and which of them count."""

    rollout: Rollout
    rewards: Rewards
    keep: Bool[Array, " N"]
    stats: dict


def choose_rows(parts: Parts, state: TrainState, rollout: Rollout, rewards: Rewards) -> Selected:
    """The selection slot, then stable compaction of each group to train_group_size rows."""
    plan, selection = parts.plan, parts.slots["selection"]
    if parts.wants("sampled_mean") or parts.wants("sampled_count"):
        rewards = _with_sampled_statistics(rewards, plan.group_size)
    groups = lambda x: x.reshape(-1, plan.group_size)
    valid = groups(rewards.valid)
    keep, stats = valid, state.stats
    if selection is not None:
        offered = dict(
            rewards=groups(rewards.total),
            correct=groups(rewards.correct),
            valid=valid,
            stats=state.stats,
            step=state.step,
            key=_step_key(state, SELECTION),
        )
        keep, changed = selection(offered)
        keep, stats = keep & valid, state.stats | changed
    tree = (rollout, rewards, keep.reshape(-1))
    if plan.train_group_size < plan.group_size:
        order = jnp.argsort(~keep, axis=1, stable=True)[:, : plan.train_group_size]
        tree = _take_rows(tree, (jnp.arange(keep.shape[0])[:, None] * plan.group_size + order).reshape(-1))
    return Selected(tree[0], tree[1], tree[2], stats)


def compact_groups(parts: Parts, selected: Selected) -> Selected:
    """prompts_per_step groups: those with a kept row first, in their old order; the rest is dropped and costs nothing."""
    size, wanted = parts.plan.train_group_size, parts.plan.prompts_per_step
    kept = selected.keep.reshape(-1, size)
    if kept.shape[0] == wanted:
        return selected
    order = jnp.argsort(~kept.any(1), stable=True)[:wanted]
    tree = _take_rows(selected[:3], (order[:, None] * size + jnp.arange(size)).reshape(-1))
    return Selected(tree[0], tree[1], tree[2], selected.stats)


def select_phase(parts: Parts, state: TrainState, rollout: Rollout, rewards: Rewards) -> Selected:
    """What one round of sampling leaves to train on."""
    return compact_groups(parts, choose_rows(parts, state, rollout, rewards))


def _take_rows(tree, index: Int[Array, " n"]):
    return jax.tree.map(lambda x: constrain_rows(x[index]), tree)


def update_phase(
    parts: Parts, state: TrainState, rollout: Rollout, rewards: Rewards, sampling: Sampling
) -> tuple[TrainState, Metrics, Bool[Array, " N"]]:
    """Selection, advantages and all optimizer updates of a step. Returns the kept rows' mask last."""
    selected = select_phase(parts, state, rollout, rewards)
    state, metrics = train_phase(parts, state, selected, sampling)
    return state, metrics, selected.keep


def train_phase(parts: Parts, state: TrainState, selected: Selected, sampling: Sampling) -> tuple[TrainState, Metrics]:
    """Advantages and all optimizer updates of a step, on selected rows."""
    rollout, rewards, keep, stats = selected
    state = dataclasses.replace(state, stats=stats)
    batch, metrics = _training_rows(parts, state, rollout, rewards, keep, sampling)
    minibatches = split_strided(batch, parts.plan.minibatches, block=parts.plan.train_group_size)
    key = _step_key(state, OBJECTIVE)

    def one_update(state, index):
        chosen = jax.tree.map(lambda x: x[index % parts.plan.minibatches], minibatches)
        loss, measured, grads = loss_and_gradient(
            parts, state.params, chosen, jax.random.fold_in(key, index), sampling.temperature
        )
        state, applied = apply_gradient(parts, state, loss, grads)
        return state, measured | applied

    state, per_update = jax.lax.scan(one_update, state, jnp.arange(parts.plan.updates_per_step))
    metrics |= {name: x.max() if name.endswith("_max") else x.mean() for name, x in per_update.items()}
    metrics["actor/skipped_updates"] = per_update["actor/skipped_updates"].sum()
    if parts.token_reward is not None:
        learned, measured = _learn_token_rewards(parts, parts.token_reward, state, batch)
        state, metrics = (
            dataclasses.replace(state, models=state.models | {token_reward.NAME: learned}),
            metrics | measured,
        )
    state = dataclasses.replace(state, step=state.step + 1)
    metrics["training/trained_fraction"] = keep.astype(jnp.float32).mean()
    metrics["training/global_step"] = state.step.astype(jnp.float32)
    return state, metrics


def _training_rows(
    parts: Parts, state: TrainState, rollout: Rollout, rewards: Rewards, keep: Bool[Array, " N"], sampling: Sampling
) -> tuple[Minibatch, Metrics]:
    """Everything the updates of a step hold fixed: advantages, and old and reference log-probabilities where asked."""
    plan = parts.plan
    groups = lambda x: x.reshape(-1, plan.train_group_size)
    mask = rollout.completion_mask & keep[:, None]
    on_policy = rewards.valid & ~rollout.off_policy
    success = masked_mean(groups(rewards.correct), groups(on_policy), axis=1)
    rows = Minibatch(
        tokens=rollout.tokens,
        prompt_len=rollout.prompt_len,
        row_mask=rollout.completion_mask,
        completion_mask=mask,
        rollout_logprobs=rollout.rollout_logprobs,
        advantages=jnp.zeros_like(rollout.rollout_logprobs),
        rewards=rewards.total,
        correct=rewards.correct,
        success_rate=jnp.repeat(success, plan.train_group_size),
        off_policy=rollout.off_policy,
        old_logprobs=None,
        ref_logprobs=None,
        reference_mask=None if rollout.reference_mask is None else rollout.reference_mask & mask,
        expert_ids=rollout.expert_ids,
    )
    early = any(s is not None and "old_logprobs" in s.wants for s in (parts.slots["advantages"],))
    old = ref = None
    if plan.updates_per_step > 1 or early:
        old = _score_in_pieces(parts, state.params, rows, sampling.temperature)
    if parts.wants("ref_logprobs"):
        own = dataclasses.replace(rows, expert_ids=None)  # the reference is what it was: its routers choose
        ref = _score_in_pieces(parts, parts.reference(state), own, sampling.temperature)
    if parts.wants("token_scores") and parts.token_reward is not None:
        pieces = plan.pieces_of(rows.tokens.shape[0])
        token_rows = token_reward.Rows(rows.tokens, rows.row_mask, rows.prompt_len)
        params = state.models[token_reward.NAME]["params"]
        rows = dataclasses.replace(
            rows, token_scores=token_reward.scores(parts.token_reward, params, token_rows, pieces)
        )
    advantages_slot = parts.slots["advantages"]
    assert advantages_slot is not None
    advantages = advantages_slot(
        dict(
            rewards=groups(rewards.total),
            correct=groups(rewards.correct),
            valid=groups(keep),
            keep=groups(keep),
            off_policy=groups(rollout.off_policy),
            sampled_mean=None if rewards.sampled_mean is None else groups(rewards.sampled_mean),
            sampled_count=None if rewards.sampled_count is None else groups(rewards.sampled_count),
            completion_mask=mask,
            old_logprobs=old,
            ref_logprobs=ref,
            token_rewards=rewards.token_rewards,
        )
    )
    if advantages.shape != mask.shape:
        advantages = jnp.broadcast_to(advantages.reshape(-1, 1), mask.shape)
    advantages = jnp.where(mask, advantages, 0.0)
    metrics = _advantage_metrics(advantages, mask)
    return dataclasses.replace(rows, advantages=advantages, old_logprobs=old, ref_logprobs=ref), metrics


def _learn_token_rewards(
    parts: Parts, static: token_reward.TokenReward, state: TrainState, batch: Minibatch
) -> tuple[dict, Metrics]:
    """The token reward model's own update, from the rows that the policy was trained on."""
    rows = token_reward.Rows(batch.tokens, batch.row_mask, batch.prompt_len)
    kept = batch.completion_mask.any(1)
    pieces = parts.plan.pieces_of(rows.tokens.shape[0])
    return token_reward.update(static, state.models[token_reward.NAME], rows, batch.correct, kept, pieces)


def _score_in_pieces(
    parts: Parts, params: PyTree, rows: Minibatch | ScoredRows, temperature: Float[Array, ""]
) -> Float[Array, "N T"]:
    """Log-probabilities of all rows, no more of them at a time than a microbatch holds."""
    rows = ScoredRows(rows.tokens, rows.prompt_len, rows.row_mask, rows.expert_ids)
    run = lambda piece: score_rows(parts, params, piece, temperature).logprobs
    return in_pieces(run, rows, parts.plan.pieces_of(rows.tokens.shape[0]))


def _advantage_metrics(advantages: Float[Array, "N T"], mask: Bool[Array, "N T"]) -> Metrics:
    some = mask.any()
    return {
        "critic/advantages/mean": masked_mean(advantages, mask),
        "critic/advantages/max": jnp.where(some, jnp.max(jnp.where(mask, advantages, -jnp.inf)), 0.0),
        "critic/advantages/min": jnp.where(some, jnp.min(jnp.where(mask, advantages, jnp.inf)), 0.0),
    }


def rollout_metrics(parts: Parts, rollout: Rollout, rewards: Rewards, decode_steps: Int[Array, ""]) -> Metrics:
    """What the samples of a step were like, before any selection; demonstrations are no samples."""
    plan = parts.plan
    by_group = rewards.total.reshape(-1, plan.group_size)
    spread = by_group.max(1) - by_group.min(1)
    if plan.demonstrations:
        drawn = lambda x: x.reshape(-1, plan.group_size, *x.shape[1:])[:, : plan.num_samples].reshape(-1, *x.shape[1:])
        rollout, rewards = jax.tree.map(drawn, (rollout, rewards))
    length = rollout.completion_mask.sum(1).astype(rewards.total.dtype)
    valid = rewards.valid
    as_float = lambda x: x.astype(length.dtype)
    return {
        "critic/score/mean": masked_mean(rewards.correct, valid),
        "critic/rewards/mean": masked_mean(rewards.total, valid),
        "critic/rewards/max": rewards.total.max(),
        "critic/rewards/min": rewards.total.min(),
        "reward/error_fraction": 1.0 - as_float(valid).mean(),
        "frac_reward_zero_std": as_float(spread == 0).mean(),
        "response_length/mean": length.mean(),
        "response_length/max": length.max(),
        "response_length/min": length.min(),
        "response_length/clip_ratio": as_float(rollout.truncated).mean(),
        "prompt_length/mean": as_float(rollout.prompt_len).mean(),
        "perf/total_num_tokens": length.sum() + as_float(rollout.prompt_len).sum(),
        "perf/slot_occupancy": length.sum() / jnp.maximum(decode_steps * parts.rollout.num_slots, 1),
    } | {f"reward/{name}": masked_mean(part, valid) for name, part in rewards.parts.items()}


def sampled_rows(parts: Parts, prompts: Prompts, rollout: Rollout, rewards: Rewards) -> Sampled:
    """The first groups, for the logs."""
    rows = rollout.tokens.shape[0] if parts.log_groups < 0 else parts.log_groups * parts.plan.group_size
    whole = Sampled(
        tokens=rollout.tokens,
        prompt_len=rollout.prompt_len,
        completion_mask=rollout.completion_mask,
        rollout_logprobs=rollout.rollout_logprobs,
        uid=jnp.repeat(prompts.uid, parts.plan.group_size),
        truncated=rollout.truncated,
        reward=rewards.total,
        correct=rewards.correct,
        valid=rewards.valid,
        off_policy=rollout.off_policy,
    )
    return jax.tree.map(lambda x: x[:rows], whole)


def learn_phase(
    parts: Parts,
    state: TrainState,
    prompts: Prompts,
    rollout: Rollout,
    verdicts: Verdicts,
    decode_steps: Int[Array, ""],
    sampling: Sampling,
) -> tuple[TrainState, Metrics, Sampled]:
    """Everything after the verdicts: rewards, selection, advantages, updates, metrics."""
    rewards, trained = reward_phase(parts, state, prompts, rollout, verdicts, sampling)
    metrics = rollout_metrics(parts, rollout, rewards, decode_steps)
    state, measured, _ = update_phase(parts, state, trained, rewards, sampling)
    return state, metrics | measured, sampled_rows(parts, prompts, rollout, rewards)
