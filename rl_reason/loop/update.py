"""One optimizer update from a minibatch: the objective in log-probability space, two streamed passes, optax."""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason import policy
from rl_reason.aggregation import aggregate, token_set
from rl_reason.batch import merge_strided, split_strided
from rl_reason.loop.optimizer import optimizer_step, widened
from rl_reason.loop.partition import join, split
from rl_reason.loop.parts import Parts
from rl_reason.masked import masked_mean
from rl_reason.models import moe
from rl_reason.models.score import Scores, score
from rl_reason.types import Metrics, TrainState, struct

S = typing.TypeVar("S", bound=typing.Any)  # scores of rows


@struct
class ScoredRows:
    """What a forward needs to know of rows."""

    tokens: Int[Array, "*m N T"]
    prompt_len: Int[Array, "*m N"]
    row_mask: Bool[Array, "*m N T"]
    expert_ids: Int[Array, "*m N LK T"] | None = None


@struct
class Minibatch:
    """Rows as the objective sees them. ``completion_mask`` is already ANDed with keep and valid."""

    tokens: Int[Array, "*m N T"]
    prompt_len: Int[Array, "*m N"]
    row_mask: Bool[Array, "*m N T"]  # the completion as sampled: what the model is run on
    completion_mask: Bool[Array, "*m N T"]
    rollout_logprobs: Float[Array, "*m N T"]
    advantages: Float[Array, "*m N T"]
    rewards: Float[Array, "*m N"]
    correct: Float[Array, "*m N"]
    success_rate: Float[Array, "*m N"]
    off_policy: Bool[Array, "*m N"]
    old_logprobs: Float[Array, "*m N T"] | None  # None: this is the only update, the ratio is 1
    ref_logprobs: Float[Array, "*m N T"] | None
    reference_mask: Bool[Array, "*m N T"] | None = None  # tokens of references that the reward slot put in
    token_scores: Float[Array, "*m N T"] | None = None  # a token reward model's
    expert_ids: Int[Array, "*m N LK T"] | None = None  # to be replayed; None: routers choose


def score_rows(parts: Parts, params: PyTree, batch: Minibatch | ScoredRows, temperature: Float[Array, ""]) -> Scores:
    """The trainer's forward over the completions of some rows."""
    return score(
        params,
        batch.tokens,
        batch.prompt_len,
        batch.row_mask,
        temperature,
        parts.model,
        parts.rollout.completion_len,
        batch.expert_ids,
    )


def rollout_correction_metrics(
    old_logprobs: Float[Array, "N T"], rollout_logprobs: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Metrics:
    """How far the sampler's log-probabilities are from the trainer's on the same tokens and weights."""
    delta = old_logprobs - rollout_logprobs
    return {
        "rollout_corr/abs_diff_mean": masked_mean(jnp.abs(delta), mask),
        "rollout_corr/abs_diff_max": jnp.max(jnp.where(mask, jnp.abs(delta), 0.0)),
        "rollout_corr/k3_kl": masked_mean(policy.kl_estimate(rollout_logprobs, old_logprobs, "k3"), mask),
    }


def loss_of_scores(
    parts: Parts, scores: Scores, batch: Minibatch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Objective, correction, aggregation and regularisers: the loss of a minibatch given its scores."""
    old_logprobs = batch.old_logprobs
    if old_logprobs is None:
        old_logprobs = jax.lax.stop_gradient(scores.logprobs)
    offered = dict(
        logprobs=scores.logprobs,
        entropy=scores.entropy,
        old_logprobs=old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        completion_mask=batch.completion_mask,
        reference_mask=batch.reference_mask,
        token_scores=batch.token_scores,
        rewards=batch.rewards,
        correct=batch.correct,
        success_rate=batch.success_rate,
        off_policy=batch.off_policy,
        key=key,
    )
    objective = parts.slots["objective"]
    assert objective is not None
    losses, metrics = objective(offered)
    terms = losses if isinstance(losses, dict) else {"policy": losses}
    if set(terms) != set(parts.aggregation):
        raise ValueError(
            f"The objective returns the terms {sorted(terms)}, config.aggregation reduces {sorted(parts.aggregation)}; "
            "make them the same (a single array is the term 'policy')."
        )
    correction = parts.slots["correction"]
    if correction is not None:
        weight = jax.lax.stop_gradient(correction(offered))
        metrics = metrics | {"rollout_corr/rollout_is_mean": masked_mean(weight, batch.completion_mask)}
        terms = {name: loss * weight for name, loss in terms.items()}

    reduced = {}
    for name, loss in terms.items():
        how = parts.aggregation[name]
        over = token_set(how["over"], batch.completion_mask, batch.rewards, batch.off_policy, batch.reference_mask)
        reduced[name] = how["coef"] * aggregate(loss, over, how["how"], how["divisor"])
    total = sum(reduced.values(), jnp.zeros((), scores.logprobs.dtype))
    behaviour = jax.lax.stop_gradient(old_logprobs)
    metrics = metrics | rollout_correction_metrics(behaviour, batch.rollout_logprobs, batch.completion_mask)
    metrics |= {"actor/pg_loss": total, "actor/entropy": masked_mean(scores.entropy, batch.completion_mask)}
    if len(reduced) > 1:
        metrics |= {f"actor/{name}_loss": value for name, value in reduced.items()}
    extra, extra_metrics = _regularisers(parts, scores, batch)
    return total + extra, metrics | extra_metrics


def _regularisers(parts: Parts, scores: Scores, batch: Minibatch) -> tuple[Float[Array, ""], Metrics]:
    total, metrics = jnp.zeros((), scores.logprobs.dtype), {}
    mask = batch.completion_mask
    if kl := parts.regularisers.get("kl"):
        assert batch.ref_logprobs is not None
        estimate = policy.kl_estimate(scores.logprobs, batch.ref_logprobs, kl["estimator"])
        metrics["actor/kl_loss"] = aggregate(estimate, mask, kl["how"], kl["divisor"])
        total += kl["coef"] * metrics["actor/kl_loss"]
    if entropy := parts.regularisers.get("entropy"):
        metrics["actor/entropy_loss"] = aggregate(scores.entropy, mask, entropy["how"], entropy["divisor"])
        total -= entropy["coef"] * metrics["actor/entropy_loss"]
    routing, measured = router_terms(parts, scores.router)
    return total + routing, metrics | measured


def router_terms(parts: Parts, router: moe.RouterStatistics | None) -> tuple[Float[Array, ""] | float, Metrics]:
    """What a mixture of experts adds to a loss, and its metrics; nothing for a dense model."""
    if router is None:
        return 0.0, {}
    losses = {"balance": moe.balance_loss(router), "z": moe.z_loss(router)}
    total = sum(parts.router_coefs[name] * loss for name, loss in losses.items())
    return total, {f"router/{name}_loss": loss for name, loss in losses.items()}


def loss_and_gradient(
    parts: Parts, params: PyTree, batch: Minibatch, key: Key[Array, ""], temperature: Float[Array, ""]
) -> tuple[Float[Array, ""], Metrics, PyTree]:
    """Loss, metrics and gradient of one minibatch, streamed over microbatches with global denominators.

    Pass 1 collects scores, one VJP of the loss gives their cotangents, pass 2 pulls those back microbatch by microbatch;
    so no objective knows of microbatches. A single microbatch needs one pass. The gradient is of what learns, see
    ``partition.split``.
    """
    pieces = parts.plan.microbatches
    learned, fixed = split(params, parts.frozen)
    run = lambda learned, rows: score_rows(parts, join(learned, fixed), rows, temperature)
    if pieces == 1 or parts.objective_scope == "microbatch":

        def whole(learned, batch, key):
            return loss_of_scores(parts, run(learned, batch), batch, key)

        gradient = jax.value_and_grad(whole, has_aux=True)
        if pieces == 1:
            (loss, metrics), grads = gradient(learned, batch, key)
            return loss, metrics, grads
        return _microbatch_scope(gradient, learned, batch, key, pieces)

    loss_of = lambda scores: loss_of_scores(parts, scores, batch, key)
    return streamed(run, loss_of, learned, batch, pieces)


def streamed(
    run: Callable[[PyTree, PyTree], S],
    loss_of: Callable[[S], tuple[Float[Array, ""], Metrics]],
    params: PyTree,
    rows: PyTree,
    pieces: int,
) -> tuple[Float[Array, ""], Metrics, PyTree]:
    """Loss, metrics and gradient of ``loss_of(run(params, rows))`` with ``pieces`` of the rows in memory at a time.

    Scores are a struct of numbers a row and of ``router``, whose sums add up over the pieces; gradients do in fp32.
    """
    micro = split_strided(rows, pieces)

    def forward(_, piece):
        scores = run(params, piece)
        return None, (dataclasses.replace(scores, router=None), scores.router)

    _, (of_rows, routers) = jax.lax.scan(forward, None, micro)
    scores = dataclasses.replace(merge_strided(of_rows), router=jax.tree.map(lambda x: x.sum(0), routers))
    loss, pull_back, metrics = jax.vjp(loss_of, scores, has_aux=True)
    (cotangent,) = pull_back(jnp.ones_like(loss))
    own = split_strided(dataclasses.replace(cotangent, router=None), pieces)

    def accumulate(total, piece):
        rows, of_piece = piece
        _, pull_back = jax.vjp(lambda p: run(p, rows), params)
        (grads,) = pull_back(dataclasses.replace(of_piece, router=cotangent.router))
        return jax.tree.map(jnp.add, total, grads), None

    grads, _ = jax.lax.scan(accumulate, widened(jax.tree.map(jnp.zeros_like, params)), (micro, own))
    return loss, metrics, grads


def _microbatch_scope(gradient, params, batch, key, pieces):
    """The authors' forks' way: the objective sees one microbatch at a time and results are averaged by rows."""

    def accumulate(total, piece):
        rows, index = piece
        (loss, metrics), grads = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    zeros = widened(jax.tree.map(jnp.zeros_like, params))
    micro = split_strided(batch, pieces), jnp.arange(pieces)
    grads, (losses, metrics) = jax.lax.scan(accumulate, zeros, micro)
    mean = functools.partial(jax.tree.map, lambda x: x.mean(0))
    return losses.mean(), mean(metrics), jax.tree.map(lambda g: g / pieces, grads)


class Applied(typing.NamedTuple):
    """The state after an update, and what it measured."""

    state: TrainState
    metrics: Metrics


def apply_gradient(parts: Parts, state: TrainState, loss: Float[Array, ""], grads: PyTree) -> Applied:
    """One optimizer step of what learns, which ``grads`` are of.

    A loss or gradient that is not finite changes nothing but two counters in ``stats``. A norm above
    ``parts.skip_above_norm`` (0: none) is skipped as well, but ends a row of skipped updates, not being a broken one:
    a run whose gradients are all too large goes on, with ``actor/skipped_updates`` to show it.
    """
    learned, fixed = split(state.params, parts.frozen)
    norm = optax.tree.norm(widened(grads))
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    taken = finite & (norm <= parts.skip_above_norm) if parts.skip_above_norm else finite
    step = functools.partial(optimizer_step, parts.optimizer, finite=finite, taken=taken)
    learned, opt_state = step(learned, state.opt_state, grads)
    skipped = (~taken).astype(jnp.int32)
    stats = state.stats | {
        "skipped_updates": state.stats["skipped_updates"] + skipped,
        "skipped_in_a_row": jnp.where(finite, 0, state.stats["skipped_in_a_row"] + 1),
        "updates": state.stats["updates"] + 1 - skipped,
    }
    metrics = {
        "actor/grad_norm": norm,
        "actor/lr": jnp.asarray(parts.schedule(state.stats["updates"]), norm.dtype),
        "actor/skipped_updates": skipped.astype(norm.dtype),
    }
    params = join(learned, fixed)
    return Applied(dataclasses.replace(state, params=params, opt_state=opt_state, stats=stats), metrics)
