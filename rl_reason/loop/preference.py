"""Learning from pairs of completions: no rollouts, no rewards, a loss a pair such as ``methods/dpo.py``.

As in ``loop/update.py``, the objective sees the whole batch however few pairs the model holds at once: pass 1 streams
microbatches and keeps log-probabilities, one VJP gives their cotangents, pass 2 pulls those back.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from rl_reason import processes
from rl_reason.batch import in_pieces
from rl_reason.loop.partition import join, split
from rl_reason.loop.parts import Parts
from rl_reason.loop.update import apply_gradient, router_terms, streamed
from rl_reason.models.moe import RouterStatistics
from rl_reason.models.score import score
from rl_reason.models.transformer import ModelConfig
from rl_reason.types import Metrics, TrainState, struct

# A ``slots.Slot`` or its like: from what ``loss_of_scores`` offers, arrays [M] by name, to (losses [M], metrics).
PairObjective = Callable[[Mapping[str, Array]], tuple[Array, Metrics]]


@struct
class Pairs:
    """M pairs of rows with the prompt in common; a row is prompt, completion, padding without gaps."""

    chosen_tokens: Int[Array, "*K M T"]
    rejected_tokens: Int[Array, "*K M T"]
    prompt_len: Int[Array, "*K M"]  # tokens, at least 1
    chosen_mask: Bool[Array, "*K M T"]  # True = completion token, EOS included
    rejected_mask: Bool[Array, "*K M T"]
    # The reference's sums over the completion in nats, made before the run; None: the state's reference is run.
    ref_chosen_logprobs: Float[Array, "*K M"] | None = None
    ref_rejected_logprobs: Float[Array, "*K M"] | None = None


@struct
class PairScores:
    """What one forward says of M pairs: sums over completion tokens, and what they are averaged from."""

    chosen: Float[Array, "*m M"]  # log-probabilities, nats
    rejected: Float[Array, "*m M"]
    chosen_entropy: Float[Array, "*m M"]  # nats, summed too
    rejected_entropy: Float[Array, "*m M"]
    router: RouterStatistics | None  # over all rows


def pair_logprobs(
    params: PyTree, pairs: Pairs, model: ModelConfig, temperature: Float[Array, ""], completion_len: int
) -> PairScores:
    """Chosen and rejected rows in one forward over 2M rows; a completion without tokens sums to 0.

    Rows of a pair are neighbours, so that a cut over devices keeps them together. ``completion_len`` bounds the tokens
    of a completion, and is what the vocabulary head runs on.
    """
    both = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    mask = both(pairs.chosen_mask, pairs.rejected_mask)
    scores = score(
        params,
        both(pairs.chosen_tokens, pairs.rejected_tokens),
        jnp.repeat(pairs.prompt_len, 2),
        mask,
        temperature,
        model,
        completion_len,
    )
    logprobs, entropy = (x.sum(1).reshape(-1, 2) for x in (scores.logprobs, scores.entropy))  # 0 off the mask
    return PairScores(logprobs[:, 0], logprobs[:, 1], entropy[:, 0], entropy[:, 1], scores.router)


@dataclasses.dataclass(frozen=True)
class PreferenceSetting:
    """What a preference loop has beside ``Parts``; of those it takes model, optimizer, schedule and router_coefs."""

    objective: PairObjective
    completion_len: int  # tokens of the longest completion, EOS included
    temperature: float
    microbatches: int  # 1: the batch in one pass

    def __post_init__(self):
        if self.temperature <= 0 or self.completion_len < 1 or self.microbatches < 1:
            raise ValueError(
                f"preference: temperature={self.temperature} must be above 0, completion_len={self.completion_len} and "
                f"microbatches={self.microbatches} at least 1."
            )

    def check_divides(self, num_pairs: int) -> None:
        """Raises ValueError for a batch that microbatches do not cut evenly."""
        if num_pairs % self.microbatches:
            raise ValueError(
                f"preference: {num_pairs} pairs a step / microbatches={self.microbatches} = "
                f"{num_pairs / self.microbatches:g} pairs; use a divisor of {num_pairs}."
            )

    def scores(self, model: ModelConfig, params: PyTree, pairs: Pairs) -> PairScores:
        """``pair_logprobs`` in this setting."""
        return pair_logprobs(params, pairs, model, jnp.asarray(self.temperature), self.completion_len)


def with_reference(parts: Parts, setting: PreferenceSetting, ref_params: PyTree | None, pairs: Pairs) -> Pairs:
    """The pairs with the reference's log-probabilities: those they carry, else ``ref_params``' own.

    Raises:
        ValueError: when there are neither.
    """
    if pairs.ref_chosen_logprobs is not None and pairs.ref_rejected_logprobs is not None:
        return pairs
    if ref_params is None:
        raise ValueError(
            "Pairs without ref_chosen_logprobs and ref_rejected_logprobs need TrainState.ref_params; keep a reference, or "
            "make them before the run with loop.preference.precompute_reference."
        )
    setting.check_divides(len(pairs.prompt_len))

    def run(rows: Pairs) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
        scores = setting.scores(parts.model, ref_params, rows)
        return scores.chosen, scores.rejected

    chosen, rejected = in_pieces(run, pairs, setting.microbatches)
    return dataclasses.replace(pairs, ref_chosen_logprobs=chosen, ref_rejected_logprobs=rejected)


def loss_of_scores(
    parts: Parts, setting: PreferenceSetting, scores: PairScores, pairs: Pairs
) -> tuple[Float[Array, ""], Metrics]:
    """The mean of the objective over pairs, plus the router's terms for a mixture of experts."""
    assert pairs.ref_chosen_logprobs is not None and pairs.ref_rejected_logprobs is not None  # with_reference
    chosen_len, rejected_len = pairs.chosen_mask.sum(1), pairs.rejected_mask.sum(1)
    losses, metrics = setting.objective(
        dict(
            chosen_logprobs=scores.chosen,
            rejected_logprobs=scores.rejected,
            ref_chosen_logprobs=pairs.ref_chosen_logprobs,
            ref_rejected_logprobs=pairs.ref_rejected_logprobs,
            chosen_len=chosen_len,
            rejected_len=rejected_len,
        )
    )
    loss = losses.mean()
    tokens = jnp.maximum(chosen_len.sum() + rejected_len.sum(), 1)
    metrics = metrics | {
        "actor/preference_loss": loss,
        "actor/entropy": (scores.chosen_entropy.sum() + scores.rejected_entropy.sum()) / tokens,
        "response_length/chosen": chosen_len.astype(loss.dtype).mean(),
        "response_length/rejected": rejected_len.astype(loss.dtype).mean(),
        "preference/empty_fraction": ((chosen_len == 0) | (rejected_len == 0)).astype(loss.dtype).mean(),
    }
    routing, measured = router_terms(parts, scores.router)
    return loss + routing, metrics | measured


def loss_and_gradient(
    parts: Parts, setting: PreferenceSetting, params: PyTree, pairs: Pairs
) -> tuple[Float[Array, ""], Metrics, PyTree]:
    """Loss, metrics and gradient of a batch with reference log-probabilities, streamed over microbatches.

    The gradient is of what learns, see ``partition.split``.
    """
    learned, fixed = split(params, parts.frozen)
    run = lambda learned, rows: setting.scores(parts.model, join(learned, fixed), rows)
    if setting.microbatches == 1:

        def whole(learned):
            return loss_of_scores(parts, setting, run(learned, pairs), pairs)

        (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(learned)
        return loss, metrics, grads

    setting.check_divides(len(pairs.prompt_len))
    loss_of = lambda scores: loss_of_scores(parts, setting, scores, pairs)
    return streamed(run, loss_of, learned, pairs, setting.microbatches)


def make_chunk(parts: Parts, setting: PreferenceSetting) -> Callable:
    """(state, batches [K M T]) -> (state, stacked metrics): K optimizer steps as one scan."""

    def step(state: TrainState, pairs: Pairs):
        pairs = with_reference(parts, setting, parts.reference(state), pairs)
        loss, metrics, grads = loss_and_gradient(parts, setting, state.params, pairs)
        state, applied = apply_gradient(parts, state, loss, grads)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, metrics | applied

    return lambda state, batches: jax.lax.scan(step, state, batches)


def make_counted_chunk(parts: Parts, setting: PreferenceSetting, num_pairs: int) -> Callable:
    """``make_chunk`` with the metrics that every training loop gives, and the epoch of a data set of ``num_pairs``."""

    def preference_chunk(state: TrainState, batches: Pairs):
        state, metrics = make_chunk(parts, setting)(state, batches)
        steps, pairs = batches.prompt_len.shape
        as_float = lambda x: x.astype(metrics["actor/preference_loss"].dtype)
        done = as_float(state.step - steps + 1 + jnp.arange(steps))
        completions = batches.chosen_mask.sum((1, 2)) + batches.rejected_mask.sum((1, 2))
        return state, metrics | {
            "training/global_step": done,
            "training/epoch": done * pairs / num_pairs,
            "perf/total_num_tokens": as_float(2 * batches.prompt_len.sum(1) + completions),
        }

    return preference_chunk


def evaluate(
    parts: Parts, setting: PreferenceSetting, params: PyTree, ref_params: PyTree | None, pairs: Pairs
) -> Metrics:
    """The metrics of pairs without an update; held-out ``rewards/accuracies``, say."""
    pairs = with_reference(parts, setting, ref_params, pairs)
    return loss_of_scores(parts, setting, setting.scores(parts.model, params, pairs), pairs)[1]


SumsOfSides = tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]  # of chosen and rejected


def make_scorer(parts: Parts, setting: PreferenceSetting) -> Callable[[PyTree, Iterable[Pairs], int], SumsOfSides]:
    """``precompute_reference``'s own function, compiled once for all that it is given."""
    run = jax.jit(functools.partial(with_reference, parts, setting))

    def scorer(params: PyTree, batches: Iterable[Pairs], num_pairs: int) -> SumsOfSides:
        found = [(np.zeros(0, np.float32), np.zeros(0, np.float32))]
        for pairs in batches:
            done = run(params, dataclasses.replace(pairs, ref_chosen_logprobs=None, ref_rejected_logprobs=None))
            found.append(processes.to_host((done.ref_chosen_logprobs, done.ref_rejected_logprobs)))
        chosen, rejected = (np.concatenate(x) for x in zip(*found, strict=True))
        if len(chosen) < num_pairs:
            raise ValueError(f"precompute_reference: {len(chosen)} pairs in the batches and num_pairs={num_pairs}.")
        return chosen[:num_pairs], rejected[:num_pairs]

    return scorer


def precompute_reference(
    parts: Parts, setting: PreferenceSetting, ref_params: PyTree, batches: Iterable[Pairs], num_pairs: int
) -> SumsOfSides:
    """(chosen, rejected) log-probabilities of a data set's ``num_pairs`` pairs under the reference, nats; one pass.

    ``batches`` go over the data set once and in order, all of one shape; what the last is filled up with is cut off.
    Nothing is kept: hold on to the result, and no reference has to be held during the run.

    Raises:
        ValueError: when the batches hold fewer pairs.
    """
    return make_scorer(parts, setting)(ref_params, batches, num_pairs)
