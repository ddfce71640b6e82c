"""The cohort loop: several policies answer the same prompts, vote, and learn from the vote, each on its own samples.

    for each policy   draw_<policy>    rollout; with verifiers in graph verdicts and answers too
    for all           vote             ids over [B M K], rewards [N] a policy; needs all draws, which is the barrier
    for each policy   learn_<policy>   the loop's own update, with those rewards in place of its reward slot

In graph all policies read and write one tokenizer's tokens. With verifiers on the host answers are compared as texts, and
each policy may have a tokenizer, and so prompts, of its own.

Policies may differ in size, so that each has programs of its own; one is in memory with its gradients at a time. No
gradient crosses: what passes between programs are tokens, answers and rewards. Verdicts are for the metrics alone, and
slots that would read them are refused. Policies need root keys of their own: equal weights under equal keys draw equal
samples, and are one voter counted twice.

M policies, K samples each, B prompts, N = B K rows a policy.
"""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rl_reason import processes, voting
from rl_reason.loop.engine import Advanced, Clock, step_by_step, verdicts_everywhere
from rl_reason.loop.parts import Parts
from rl_reason.loop.step import Sampled, learn_phase, sample_phase
from rl_reason.masked import masked_mean
from rl_reason.methods import rlccf, ttrl
from rl_reason.models.transformer import ModelConfig
from rl_reason.sampling import Sampling
from rl_reason.sharding import constrain_rows
from rl_reason.slots import Slot
from rl_reason.tasks.answer_ids import Spell, Spelled, class_ids, join
from rl_reason.types import Metrics, Prompts, Rewards, Rollout, TrainState, Verdicts, Verify

Vote = Callable[[Int[Array, "B M K"]], rlccf.Vote]
AskHost = Callable[[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray], dict[str, tuple]]  # rewards.CohortVerifier
States = dict[str, TrainState]  # by policy
HIDDEN = frozenset({"correct", "success_rate"})  # what verdicts make of rows; labels, that is


def parts_of_models(parts: Parts, models: Mapping[str, ModelConfig]) -> dict[str, Parts]:
    """The same training around several models."""
    return {name: dataclasses.replace(parts, model=model) for name, model in models.items()}


def _label_right(
    label: Int[Array, " B"], answers: Int[Array, "B J"], right: Bool[Array, "B J"], valid: Bool[Array, "B J"]
) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
    """Whether some row gave a prompt's label and was right, and whether that is known; no label is wrong."""
    judged = voting.agreeing(answers, label) & valid
    return (judged & right).any(1), judged.any(1) | (label < 0)


def _label_accuracy(*rows: Array) -> Float[Array, ""]:
    """Share of prompts whose label is right, of those of which that is known."""
    right, known = _label_right(*rows)
    return masked_mean(right.astype(float), known)


def _correlation(x: Float[Array, "B M"], y: Float[Array, "B M"], known: Bool[Array, "B M"]) -> Float[Array, ""]:
    """Pearson's r over what is known; 0 where one of the two does not vary."""
    dx, dy = (a - masked_mean(a, known) for a in (x, y))
    spread = masked_mean(dx * dx, known) * masked_mean(dy * dy, known)
    return jnp.where(spread > 0, masked_mean(dx * dy, known) / jnp.sqrt(jnp.where(spread > 0, spread, 1.0)), 0.0)


def vote_metrics(
    names: Sequence[str],
    answers: Int[Array, "B M K"],
    result: rlccf.Vote,
    right: Bool[Array, "B M K"],
    valid: Bool[Array, "B M K"],
) -> Metrics:
    """How the vote went, and how it compares with the verdicts; 0 where nothing is valid.

    ``cohort/agreement/a_b`` is the share of pairs of samples, one of each, with one answer; ``cohort/calibration`` how
    self-consistency and the truth of a policy's own majority correlate, over prompts and policies: below 0 weights do harm.
    """
    flat = lambda x: x.reshape(x.shape[0], -1)
    accuracy = lambda label, *rows: _label_accuracy(label, *map(flat, rows))
    plain = rlccf.plain_vote(answers).label
    metrics = {
        "cohort/label_accuracy": accuracy(result.label, answers, right, valid),
        "cohort/group_vote_accuracy": accuracy(plain, answers, right, valid),  # without weights
        "cohort/reward_accuracy": masked_mean(((result.rewards > 0) == right).astype(float), valid),
        "cohort/consistency": result.rewards.mean(),  # the paper's CC
        "cohort/labelled_fraction": (result.label >= 0).astype(float).mean(),
    }
    majorities = [_label_right(ttrl.label(x := answers[:, m]), x, right[:, m], valid[:, m]) for m in range(len(names))]
    own_right, known = (jnp.stack(x, axis=1) for x in zip(*majorities, strict=True))
    own_right, consistency = own_right.astype(float), voting.self_consistency(answers)
    metrics["cohort/calibration"] = _correlation(consistency, own_right, known)
    for m, name in enumerate(names):
        own = answers[:, m]
        metrics[f"{name}/self_consistency"] = consistency[:, m].mean()
        metrics[f"{name}/majority_accuracy"] = masked_mean(own_right[:, m], known[:, m])
        metrics[f"{name}/answered_fraction"] = (own >= 0).astype(float).mean()
    for a, b in itertools.combinations(range(len(names)), 2):
        agreement = voting.agreement(answers[:, a], answers[:, b]).mean()
        metrics[f"cohort/agreement/{names[a]}_{names[b]}"] = agreement
    return metrics


def vote_phase(
    names: Sequence[str],
    vote: Vote,
    group_size: int,
    verdicts: Mapping[str, Verdicts],
) -> tuple[dict[str, Rewards], Metrics]:
    """Rewards by policy; ``answers`` of verdicts are numbered over all rows of a prompt.

    ``correct`` is the verdict, for metrics; rows without a verdict vote but are not trained on.
    """
    side_by_side = lambda of: jnp.stack([of(name).reshape(-1, group_size) for name in names], axis=1)
    ids = side_by_side(lambda name: verdicts[name].answers)
    right = side_by_side(lambda name: verdicts[name].valid & (verdicts[name].score >= 1.0))
    valid = side_by_side(lambda name: verdicts[name].valid)
    result = vote(ids)
    rewards = {}
    for m, name in enumerate(names):
        dtype = verdicts[name].score.dtype
        own = lambda x, m=m, dtype=dtype: x[:, m].reshape(-1).astype(dtype)
        rewards[name] = constrain_rows(Rewards(own(result.rewards), own(right), verdicts[name].valid))
    return rewards, vote_metrics(names, ids, result, right, valid)


def compared(
    names: Sequence[str], group_size: int, answers: Mapping[str, Spelled], verdicts: Mapping[str, Verdicts]
) -> dict[str, Verdicts]:
    """The verdicts, with ``answers`` numbered over all rows of a prompt."""
    rows = verdicts[names[0]].score.shape[0]
    ids = class_ids(join([answers[name] for name in names], rows // group_size), len(names) * group_size)
    ids = ids.reshape(-1, len(names), group_size)
    own = lambda m: ids[:, m].reshape(-1)
    return {name: dataclasses.replace(verdicts[name], answers=own(m)) for m, name in enumerate(names)}


def learn(
    parts: Parts,
    state: TrainState,
    prompts: Prompts,
    rollout: Rollout,
    decode_steps: Int[Array, ""],
    verdicts: Verdicts,
    rewards: Rewards,
    sampling: Sampling,
) -> tuple[TrainState, Metrics, Sampled]:
    """A policy's own update, with what was voted in place of its reward slot."""
    voted = dataclasses.replace(parts, slots={**parts.slots, "reward": Slot(lambda: rewards, frozenset())})
    return learn_phase(voted, state, prompts, rollout, verdicts, decode_steps, sampling)


def over_policies(names: Sequence[str], metrics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The loop's metrics under their own names, for what reads a run of one policy: means, extremes where they are
    extremes, and sums of tokens and of skipped updates."""
    how = {"/max": np.max, "_max": np.max, "/min": np.min, "total_num_tokens": np.sum, "skipped_updates": np.sum}
    found = {}
    for key in (key.removeprefix(f"{names[0]}/") for key in metrics if key.startswith(f"{names[0]}/")):
        reduce = next((fn for end, fn in how.items() if key.endswith(end)), np.mean)
        if all(f"{name}/{key}" in metrics for name in names):
            found[key] = reduce([metrics[f"{name}/{key}"] for name in names], axis=0)
    return found


def check(policies: Mapping[str, Parts]) -> None:
    """Refuses policies that cannot vote together.

    Raises:
        ValueError: their names, batches that do not fit together, or slots that read verdicts.
    """
    if not policies or any(not name or "/" in name or name == "cohort" for name in policies):
        raise ValueError(
            f"The cohort's policies are named {sorted(policies)}; give one or more, named without '/' and not 'cohort'."
        )
    plans = {name: parts.plan for name, parts in policies.items()}
    shapes = {(plan.group_size, plan.generated_prompts) for plan in plans.values()}
    if len(shapes) > 1 or any(plan.max_rounds > 1 for plan in plans.values()):
        found = "; ".join(f"{name}: {plan.describe()}" for name, plan in plans.items())
        raise ValueError(
            "A cohort votes on the same prompts with as many samples each, in one round: make group_size and "
            f"generated_prompts the same, and max_rounds 1. {found}."
        )
    for name, parts in policies.items():
        for slot in ("selection", "advantages", "correction", "objective"):
            filled = parts.slots[slot]
            if filled is not None and (read := sorted(filled.wants & HIDDEN)):
                raise ValueError(
                    f"{name}: config.{slot} asks for {', '.join(read)}, which verdicts decide, and a cohort trains without "
                    "labels. Take a function that reads rewards."
                )


def _named(fn: Callable, name: str) -> Callable:
    """The function under the name that its compiled program goes by."""
    fn.__name__ = name
    return fn


class Read(typing.NamedTuple):
    """What reads completions inside the programs: their verdicts, and the bytes of their answers."""

    verify: Verify
    spell: Spell


class Cohort:
    """Several policies, a step at a time: all draw, all vote, each learns.

    ``read`` reads completions in graph, or asks the host about all of them.

    Raises:
        ValueError: policies whose batches do not fit together, or slots that read verdicts.
    """

    draws_ahead = False
    pending = None

    def __init__(self, policies: Mapping[str, Parts], read: Read | AskHost, vote: Vote, mesh: jax.sharding.Mesh):
        check(policies)
        self._names = names = tuple(policies)
        self._group_size = group_size = policies[names[0]].plan.group_size
        self._mesh, self._ask = mesh, None if isinstance(read, Read) else read

        def draw(parts, state, prompts, sampling):
            rollout, decode_steps = sample_phase(parts, state, prompts, sampling)
            said = None
            if isinstance(read, Read):
                said = read.verify(rollout, prompts), read.spell(rollout.tokens, rollout.completion_mask)
            return rollout, decode_steps, said

        def compiled(fn, word, **kwargs):
            made = {name: functools.partial(fn, parts) for name, parts in policies.items()}
            return {name: jax.jit(_named(f, f"{word}_{name}"), **kwargs) for name, f in made.items()}

        self.draw, self.learn = compiled(draw, "draw", keep_unused=True), compiled(learn, "learn", donate_argnums=0)

        def together(said):
            if isinstance(read, Read):
                verdicts, answers = ({name: said[name][i] for name in names} for i in range(2))
                said = compared(names, group_size, answers, verdicts)
            return *vote_phase(names, vote, group_size, said), said

        self._vote = jax.jit(_named(together, "vote"))
        # Compiled by the first step, and then never again.
        self.programs = (*(f"{word}_{name}" for name in names for word in ("draw", "learn")), "vote")

    def advance(self, states: States, prompts: Mapping[str, Prompts], sampling: Sampling) -> Advanced:
        """Runs as many steps as ``prompts``, of each policy the same in its own tokens, have leading entries; ``states`` are
        consumed.

        States and samples come back by policy; metrics are ``<policy>/...``, ``cohort/...``, and the loop's own names over
        all policies.

        Raises:
            ValueError: states that are not the policies', or not of one step.
        """
        at = {name: int(state.step) for name, state in states.items()}
        if set(at) != set(self._names) or len(set(at.values())) > 1:
            raise ValueError(
                f"The states are at steps {at}; give one for each of {', '.join(self._names)}, at one step."
            )
        step = lambda states, batch, clock: self._step(states, batch, sampling, clock)
        states, (metrics, sampled), timing = step_by_step(step, states, prompts)
        return Advanced(states, metrics | over_policies(self._names, metrics), sampled, timing)

    def _step(self, states: States, batch: Mapping[str, Prompts], sampling: Sampling, clock: Clock):
        drawn = {name: self.draw[name](states[name], batch[name], sampling) for name in self._names}
        jax.block_until_ready(drawn)
        clock.mark("gen")
        said = {name: of for name, (_, _, of) in drawn.items()} if self._ask is None else self._asked(drawn, batch)
        rewards, metrics, verdicts = jax.block_until_ready(self._vote(said))
        clock.mark("reward")
        learned, sampled = {}, {}
        for name in self._names:
            rollout, decode_steps, _ = drawn.pop(name)
            given = (batch[name], rollout, decode_steps, verdicts[name], rewards[name], sampling)
            learned[name], own, sampled[name] = self.learn[name](states[name], *given)
            metrics |= {f"{name}/{key}": value for key, value in own.items()}
        return learned, (metrics, sampled)

    def _asked(self, drawn: Mapping[str, tuple], batch: Mapping[str, Prompts]) -> dict[str, Verdicts]:
        """Verdicts of the host: each process asks about its own rows, which are the same of every policy."""
        assert self._ask is not None
        uid = np.repeat(processes.to_host(batch[self._names[0]].uid), self._group_size)
        index, rows = np.arange(0), {}
        for name, (rollout, *_) in drawn.items():
            index, tokens = processes.own_rows(rollout.tokens)
            rows[name] = tokens, processes.own_rows(rollout.completion_mask)[1]
        found = self._ask(rows, uid[index])
        dtype = lambda name: drawn[name][0].rollout_logprobs.dtype
        return {
            name: verdicts_everywhere(own, index, len(uid), dtype(name), self._mesh) for name, own in found.items()
        }
