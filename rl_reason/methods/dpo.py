"""Direct preference optimisation: a loss on pairs of completions, without reward model or rollouts (arXiv:2305.18290).

    Delta = log(pi / ref)(chosen) - log(pi / ref)(rejected)         sums over completion tokens, nats (eq. 7)

Each loss is a function of Delta alone, or of Delta' with a mean over tokens instead of each sum; formulas and names are
TRL's (huggingface/trl f2cd577). Departures: ``label_smoothing`` acts on ``robust`` alone, as in current TRL, and is refused
elsewhere rather than ignored; a completion without tokens has log-ratio 0 and length 1, where TRL's averages divide by 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rl_reason.types import Metrics

LOSS_TYPES = ("sigmoid", "ipo", "sigmoid_norm", "hinge", "robust")
PER_TOKEN = ("ipo", "sigmoid_norm")  # these see token means of the log-ratios


def objective(
    chosen_logprobs: Float[Array, " M"],
    rejected_logprobs: Float[Array, " M"],
    ref_chosen_logprobs: Float[Array, " M"],
    ref_rejected_logprobs: Float[Array, " M"],
    chosen_len: Int[Array, " M"],
    rejected_len: Int[Array, " M"],
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
) -> tuple[Float[Array, " M"], Metrics]:
    """A loss a pair; log-probabilities are sums over completion tokens in nats, lengths are in tokens.

    Metrics are TRL's: beta times the summed log-ratios as implicit rewards, whatever ``loss_type``.

    Raises:
        ValueError: from ``check``.
    """
    check(loss_type, beta, label_smoothing)
    # A sum over no tokens is 0, whatever stands there.
    chosen_logprobs = jnp.where(chosen_len > 0, chosen_logprobs, 0.0)
    rejected_logprobs = jnp.where(rejected_len > 0, rejected_logprobs, 0.0)
    chosen = chosen_logprobs - jax.lax.stop_gradient(jnp.where(chosen_len > 0, ref_chosen_logprobs, 0.0))
    rejected = rejected_logprobs - jax.lax.stop_gradient(jnp.where(rejected_len > 0, ref_rejected_logprobs, 0.0))
    if loss_type in PER_TOKEN:
        delta = chosen / jnp.maximum(chosen_len, 1) - rejected / jnp.maximum(rejected_len, 1)
    else:
        delta = chosen - rejected
    losses = pair_losses(delta, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)

    rewards = jax.lax.stop_gradient((beta * chosen, beta * rejected))
    metrics = {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracies": (rewards[0] > rewards[1]).astype(losses.dtype).mean(),
        "logps/chosen": jax.lax.stop_gradient(chosen_logprobs).mean(),
        "logps/rejected": jax.lax.stop_gradient(rejected_logprobs).mean(),
    }
    return losses, metrics


def pair_losses(
    delta: Float[Array, " M"], *, loss_type: str, beta: float, label_smoothing: float
) -> Float[Array, " M"]:
    """The loss of a difference of log-ratios, in nats; finite, with a finite slope, wherever ``beta * delta`` is.

    sigmoid, sigmoid_norm: -log sigma(beta delta) (arXiv:2305.18290 eq. 7); slope -beta sigma(-beta delta).
    ipo: (delta - 1 / (2 beta))^2 (arXiv:2310.12036, where delta is of sums; TRL's and ours is of token means).
    hinge: max(0, 1 - beta delta) (arXiv:2305.10425).
    robust: [-(1 - eps) log sigma(beta delta) + eps log sigma(-beta delta)] / (1 - 2 eps) (arXiv:2403.00409): unbiased when a
    share eps of the labels is flipped, and without a lower bound for eps > 0: it tends to -eps beta delta / (1 - 2 eps).
    """
    logits = beta * delta
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -jax.nn.log_sigmoid(logits)
    if loss_type == "ipo":
        return (delta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return jax.nn.relu(1 - logits)
    right, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (label_smoothing * flipped - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def check(loss_type: str, beta: float, label_smoothing: float) -> None:
    """Refuses hyperparameters that mean nothing.

    Raises:
        ValueError: names the hyperparameter and what to set.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"dpo: loss_type={loss_type!r}; there are {', '.join(LOSS_TYPES)}.")
    if beta <= 0:
        raise ValueError(f"dpo: beta={beta} must be above 0; at 0 no loss depends on the policy.")
    if loss_type != "robust" and label_smoothing != 0:
        raise ValueError(
            f"dpo: label_smoothing={label_smoothing} acts on loss_type='robust' only, and this is {loss_type!r}; "
            "set it to 0, or loss_type='robust'."
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"dpo: label_smoothing={label_smoothing} is the share of flipped labels and must lie in [0, 0.5): at 0.5 "
            "labels say nothing, and the loss divides by 1 - 2 label_smoothing."
        )
