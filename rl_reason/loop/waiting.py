"""Prompts that passed a filter but found no place in the step's batch: the next step draws them anew, before any other.

As RLPR's code does with surplus prompts (arXiv:2506.18254). Their old completions are not kept: the policy has moved on.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rl_reason.batch import split_strided
from rl_reason.sharding import ROWS, constrain
from rl_reason.types import Prompts, struct

NAME = "waiting"  # in TrainState.stats


class PromptWidths(typing.NamedTuple):
    """Tokens of a prompt, and of the arrays that a run's prompts have besides; None: not that one."""

    prompt: int
    reference: int | None = None
    demonstration: int | None = None


@struct
class Waiting:
    """Places in the queue, those in use first."""

    prompts: Prompts
    taken: Bool[Array, " Q"]


def nobody(places: int, widths: PromptWidths) -> Waiting:
    """An empty queue for prompts of these widths."""
    ints = lambda *shape: jnp.zeros((places, *shape), jnp.int32)
    optional = lambda width: None if width is None else ints(width)
    prompts = Prompts(
        tokens=ints(widths.prompt),
        prompt_len=ints() + 1,
        example_id=ints(),
        uid=ints(),
        route=ints(),
        reference=optional(widths.reference),
        demonstration=optional(widths.demonstration),
        redraws=ints(),
    )
    return Waiting(prompts, jnp.zeros(places, bool))


def line_up(waiting: Waiting | None, fresh: Prompts, rounds: int) -> Prompts:
    """The prompts of each round, [rounds B ...]: those that wait, then fresh ones in the order of ``split_strided``.

    Fresh prompts that others displace are not drawn at all.
    """
    in_rounds = split_strided(fresh, rounds)
    if waiting is None:
        return in_rounds
    drawn = fresh.prompt_len.shape[0]
    flat = jax.tree.map(lambda x: x.reshape(drawn, *x.shape[2:]), in_rounds)
    flat = dataclasses.replace(flat, redraws=jnp.zeros(drawn, jnp.int32))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), waiting.prompts, flat)
    order = jnp.argsort(~jnp.concatenate([waiting.taken, jnp.ones(drawn, bool)]), stable=True)[:drawn]
    return jax.tree.map(lambda x: constrain(x[order].reshape(rounds, -1, *x.shape[1:]), None, ROWS), joined)


def those_left(waiting: Waiting, drawn: Prompts, kept: Bool[Array, "rounds B"], wanted: int) -> Waiting:
    """The queue after a step that kept these groups of ``drawn`` [rounds B ...] and trained on the first ``wanted``."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)
    surplus = kept.reshape(-1) & (jnp.cumsum(kept.reshape(-1)) > wanted)
    order = jnp.argsort(~surplus, stable=True)[: waiting.taken.shape[0]]
    prompts = jax.tree.map(lambda x: constrain(x[order]), flat)  # everywhere, as all statistics are
    return Waiting(dataclasses.replace(prompts, redraws=prompts.redraws + 1), surplus[order])
