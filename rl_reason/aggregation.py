"""From per-token losses to one number: which tokens count, and what the sum is divided by."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.masked import masked_mean, masked_sum

HOW = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "sum")
OVER = ("completion", "positive", "negative", "on_policy", "off_policy", "reference")


def token_set(
    over: str,
    completion_mask: Bool[Array, "N T"],
    rewards: Float[Array, " N"],
    off_policy: Bool[Array, " N"],
    reference_mask: Bool[Array, "N T"] | None = None,
) -> Bool[Array, "N T"]:
    """The completion tokens a term counts: all, those of rows with rewards > 0 / <= 0 or of one kind of policy, or those
    of references that the reward slot put into rows (none, when it put none)."""
    if over == "reference":
        return jnp.zeros_like(completion_mask) if reference_mask is None else completion_mask & reference_mask
    rows = {
        "completion": jnp.ones_like(off_policy),
        "positive": rewards > 0,
        "negative": rewards <= 0,
        "on_policy": ~off_policy,
        "off_policy": off_policy,
    }[over]
    return completion_mask & rows[:, None]


def aggregate(
    losses: Float[Array, "N T"], mask: Bool[Array, "N T"], how: str, divisor: float = 1.0
) -> Float[Array, ""]:
    """Reduces losses over ``mask`` and divides by ``divisor``; an empty set gives 0, and padding is never seen.

    token_mean: over all tokens. seq_mean_token_mean / seq_mean_token_sum: each row's mean / sum, then the mean over rows
    that have a token. sum: over everything (Dr.GRPO, NFT and LUFFY divide it by a constant).
    """
    if how == "token_mean":
        total = masked_mean(losses, mask)
    elif how == "seq_mean_token_mean":
        total = masked_mean(masked_mean(losses, mask, axis=1), mask.any(1))
    elif how == "seq_mean_token_sum":
        total = masked_mean(masked_sum(losses, mask, axis=1), mask.any(1))
    elif how == "sum":
        total = masked_sum(losses, mask)
    else:
        raise ValueError(f"aggregation how={how!r}; there are {', '.join(HOW)}.")
    return total / divisor


def check(aggregation: dict[str, dict]) -> None:
    """Refuses terms the loop could not reduce.

    Raises:
        ValueError: names the term, the key and what there is.
    """
    for term, spec in aggregation.items():
        where = f"config.aggregation.{term}"
        if set(spec) != {"how", "over", "divisor", "coef"}:
            raise ValueError(f"{where} has keys {sorted(spec)}; it takes exactly coef, divisor, how, over.")
        if spec["how"] not in HOW:
            raise ValueError(f"{where}.how={spec['how']!r}; there are {', '.join(HOW)}.")
        if spec["over"] not in OVER:
            raise ValueError(f"{where}.over={spec['over']!r}; there are {', '.join(OVER)}.")
        if spec["divisor"] <= 0:
            raise ValueError(f"{where}.divisor={spec['divisor']} must be above 0.")
