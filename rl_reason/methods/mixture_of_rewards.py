"""A mixture of rewards: each prompt's kind says who judges its answers (Intern-S1, arXiv:2508.15763).

    rule, task, judge:   2 v - 1           v in [0, 1]: the rules', the task's or a generative verifier's verdict
    preference:          (s - mean) / std  s: a preference model's score, over the prompt's samples, ddof 1

A prompt has one judge, and rewards are never summed: a preference model's scores mean nothing across prompts. The paper
publishes no rule for the scales; these two are a proposal. A generative verifier answers A (right), B (wrong) or C
(unfinished, no answer), of which B and C are wrong; one that answers anything else has not judged, so that the row is
invalid and is counted as such (reward/error_fraction), where xtuner scores it -1.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rl_reason.policy import full_marks, group_std
from rl_reason.types import Prompts, Rewards, Rollout

KINDS = ("rule", "task", "judge", "preference")
RULE, TASK, JUDGE, PREFERENCE = range(len(KINDS))
RIGHT, UNREADABLE = 0, -1  # labels of a generative verifier: A is 0, B 1, C 2


def reward(
    score: Float[Array, " N"],
    valid: Bool[Array, " N"],
    rollout: Rollout,
    prompts: Prompts,
    judges: Mapping[str, Callable[[], Array]],
    *,
    kinds: Sequence[str],
) -> Rewards:
    """``route`` by the prompt's task: ``kinds`` has one of KINDS for each of config.data.tasks, in their order.

    Models are asked only where a kind needs them, about all rows. A truncated answer is wrong, whoever judges it right, as
    in xtuner; a preference model sees it as it is. Part ``verdict`` is the rules' opinion of every row, which training
    does not see where another judges; ``judge_differs`` counts rows whose generative verifier disagrees with it.

    Raises:
        ValueError: an unknown kind, a kind whose model ``config.models`` lacks, or prompts without a route.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"config.reward.kinds: unknown {unknown}; there are {', '.join(KINDS)}.")
    if missing := sorted({"judge", "preference"} & set(kinds) - set(judges)):
        raise ValueError(f"config.reward.kinds needs the models {missing}: describe them in config.models.")
    if prompts.route is None:
        raise ValueError("the prompts carry no route; this reward needs data.tasks or files with sources.")
    rows = score.shape[0]
    label, preference = jnp.full(rows, UNREADABLE, jnp.int32), jnp.zeros(rows, score.dtype)
    if "judge" in kinds:
        label = judges["judge"]()
    if "preference" in kinds:
        preference = judges["preference"]().astype(score.dtype)
    kind = jnp.array([KINDS.index(name) for name in kinds], jnp.int32)[prompts.route][rollout.prompt_id]
    group_size = rows // prompts.tokens.shape[0]
    routed = route(kind, score, score, label, preference, valid, rollout.truncated, group_size)
    verdict = full_marks(score, valid)
    differs = ((kind == JUDGE) & (routed.correct != verdict)).astype(score.dtype)
    parts = routed.parts | {"verdict": verdict, "judge_differs": differs}
    return Rewards(total=routed.total, correct=routed.correct, valid=routed.valid, parts=parts)


def route(
    kind: Int[Array, " N"],
    rule_score: Float[Array, " N"],
    task_score: Float[Array, " N"],
    judge_label: Int[Array, " N"],
    preference: Float[Array, " N"],
    valid: Bool[Array, " N"],
    truncated: Bool[Array, " N"],
    group_size: int,
) -> Rewards:
    """Each row's reward from the one judge that its ``kind`` names, rows of a prompt lying together.

    Rules pass or fail, a task's score counts in part, a label A passes. ``valid`` is of rules and tasks; a label that is
    none and a preference that is not finite are invalid, and its prompt's other samples are standardised without it. A
    prompt whose preferences are all equal gets 0. ``correct`` is full marks or, by preference, better than the mean.
    """
    dtype = rule_score.dtype
    readable = (judge_label >= 0) & (judge_label <= 2)
    usable = jnp.where(kind == JUDGE, readable, jnp.where(kind == PREFERENCE, jnp.isfinite(preference), valid))
    passed = jnp.where(kind == JUDGE, judge_label == RIGHT, rule_score >= 1.0).astype(dtype)
    passed = jnp.where(kind == TASK, task_score, passed)
    passed = jnp.where(usable & ~truncated, passed, 0.0)

    groups = lambda x: x.reshape(-1, group_size)
    preferred = standardised(groups(preference), groups(usable & (kind == PREFERENCE))).reshape(-1)
    by_preference = kind == PREFERENCE
    total = jnp.where(by_preference, preferred, 2.0 * passed - 1.0)
    correct = jnp.where(by_preference, preferred > 0, passed >= 1.0).astype(dtype)
    asked = {f"by_{name}": (kind == code).astype(dtype) for code, name in enumerate(KINDS)}
    return Rewards(total=total, correct=correct, valid=usable, parts=asked)


def standardised(scores: Float[Array, "B G"], valid: Bool[Array, "B G"]) -> Float[Array, "B G"]:
    """(s - mean) / std over the valid scores of each row, ddof 1; 0 where all are equal, where one is alone, and off them.

    >>> standardised(jnp.array([[-0.5, -2.5, -4.5]]), jnp.ones((1, 3), bool)).tolist()
    [[1.0, 0.0, -1.0]]
    """
    centred, std = group_std(scores, valid, ddof=1)
    return centred / jnp.where(std == 0, 1.0, std)  # differences whose squares vanish
