"""A token reward model that learns beside the policy (OREAL, arXiv:2502.06781): its scores, and its own update a step.

It begins as a copy of the policy with a scalar head. The mean of its logits over a completion is trained to tell right from
wrong; what it says of single tokens then weighs them in the policy's loss.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason.batch import in_pieces, split_strided
from rl_reason.loop.optimizer import init_optimizer, optimizer_step, widened
from rl_reason.masked import masked_mean
from rl_reason.models import reward_head
from rl_reason.models.transformer import ModelConfig
from rl_reason.types import Metrics

NAME = "token_reward"  # in TrainState.models


@dataclasses.dataclass(frozen=True)
class TokenReward:
    """Its static half."""

    model: ModelConfig
    optimizer: optax.GradientTransformation

    def init(self, key: Key[Array, ""], policy: PyTree) -> dict[str, PyTree]:
        """{params, opt_state} around a copy of the policy."""
        params = reward_head.init(key, policy, self.model)
        return {"params": params, "opt_state": init_optimizer(self.optimizer, params)}


class Rows(typing.NamedTuple):
    """Completions to be scored or learned from."""

    tokens: Int[Array, "N T"]
    mask: Bool[Array, "N T"]  # of the completion
    prompt_len: Int[Array, " N"]

    @property
    def valid(self) -> Bool[Array, "N T"]:
        """Prompt and completion."""
        return self.mask | (jnp.arange(self.tokens.shape[1]) < self.prompt_len[:, None])


def scores(static: TokenReward, params: PyTree, rows: Rows, pieces: int) -> Float[Array, "N T"]:
    """The head's logit at each completion token, 0 elsewhere; ``pieces`` of the rows at a time."""

    def run(rows: Rows) -> Float[Array, "n T"]:
        return jnp.where(rows.mask, reward_head.token_logits(params, rows.tokens, rows.valid, static.model), 0.0)

    return in_pieces(run, rows, pieces)


def loss(
    static: TokenReward, params: PyTree, rows: Rows, right: Float[Array, " N"], learned: Bool[Array, " N"]
) -> tuple[Float[Array, ""], Metrics]:
    """Binary cross-entropy of the mean logit of each completion; 0 where no row is ``learned`` from."""
    mean = masked_mean(scores(static, params, rows, 1), rows.mask, axis=1)
    each = optax.sigmoid_binary_cross_entropy(mean, right)
    value = masked_mean(each, learned)
    agrees = ((mean > 0) == (right > 0.5)).astype(each.dtype)
    return value, {"token_reward/loss": value, "token_reward/accuracy": masked_mean(agrees, learned)}


def update(
    static: TokenReward,
    state: Mapping[str, PyTree],
    rows: Rows,
    right: Float[Array, " N"],
    learned: Bool[Array, " N"],
    pieces: int,
) -> tuple[dict[str, PyTree], Metrics]:
    """One optimizer step on these rows, of which ``pieces`` pass the model one after another: the gradient of the mean over
    all of them. One that is not finite changes nothing."""
    params = state["params"]
    gradient = jax.value_and_grad(lambda params, *own: loss(static, params, *own), has_aux=True)
    total = jnp.maximum(learned.sum(), 1)

    def add(so_far, piece):
        (_, metrics), grads = gradient(params, *piece)
        share = piece[-1].sum() / total
        part = lambda x: share.astype(x.dtype) * x
        return jax.tree.map(lambda sum_, x: sum_ + part(x), so_far, widened(grads)), jax.tree.map(part, metrics)

    zeros = widened(jax.tree.map(jnp.zeros_like, params))
    grads, metrics = jax.lax.scan(add, zeros, split_strided((rows, right, learned), pieces))
    metrics = {name: x.sum() for name, x in metrics.items()}
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    step = functools.partial(optimizer_step, static.optimizer, finite=finite, taken=finite)
    params, opt_state = step(params, state["opt_state"], grads)
    return {"params": params, "opt_state": opt_state}, metrics | {"token_reward/grad_norm": norm}
