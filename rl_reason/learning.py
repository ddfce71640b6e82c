"""``config.optimizer`` and ``config.lora``: what learns, and by which steps."""

import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import optax
from jaxtyping import PyTree

from rl_reason import sharding
from rl_reason.models import transformer
from rl_reason.models.lora import Lora, targets
from rl_reason.models.transformer import ModelConfig


def rl_schedule(o: Mapping[str, typing.Any], total_updates: int) -> Callable:
    """A rate of 0 while frozen, linear warm-up, then constant, or cosine or linear decay to ``lr_end_fraction`` of
    the rate over the run's updates."""
    frozen = o.get("frozen_updates", 0)
    if frozen:
        later = rl_schedule({**o, "frozen_updates": 0}, total_updates - frozen)
        return optax.join_schedules([optax.constant_schedule(0.0), later], [frozen])
    warm = min(o["lr_warmup_updates"], max(total_updates - 1, 0))
    rate, end, rest = o["learning_rate"], o["lr_end_fraction"], max(total_updates - warm, 1)
    if not 0 <= end <= 1:
        raise ValueError(f"config.optimizer.lr_end_fraction={end} is not in 0..1.")
    decays = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest, alpha=end),
        "linear": optax.linear_schedule(rate, end * rate, rest),
    }
    if o["lr_decay"] not in decays:
        raise ValueError(f"config.optimizer.lr_decay={o['lr_decay']!r}; there are {', '.join(decays)}.")
    if warm == 0:
        return decays[o["lr_decay"]]
    return optax.join_schedules([optax.linear_schedule(rate / warm, rate, warm), decays[o["lr_decay"]]], [warm])


def adamw(o: Mapping[str, typing.Any], schedule: Callable) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; decay spares norms and biases (one-dimensional per layer).

    Raises:
        ValueError: first moments in a type that is no float.
    """
    mu_dtype = o["mu_dtype"]
    if mu_dtype not in (None, "bfloat16", "float32"):
        raise ValueError(
            f"config.optimizer.mu_dtype={mu_dtype!r}; there are None (as the updates), bfloat16, float32."
        )

    def decays(params: PyTree) -> PyTree:
        spared = lambda path: sharding.path_matches(path, ("norm", "bias$"))
        return jax.tree_util.tree_map_with_path(lambda path, _: not spared(path), params)

    return optax.chain(
        optax.clip_by_global_norm(o["grad_clip"]),
        optax.adamw(
            schedule, o["b1"], o["b2"], o["eps"], mu_dtype=mu_dtype, weight_decay=o["weight_decay"], mask=decays
        ),
    )


def frozen(patterns: Sequence[str], model: ModelConfig) -> tuple[str, ...]:
    """The patterns of ``config.optimizer.frozen``; each has to match a parameter, and one has to be left to learn.

    Raises:
        ValueError: with the parameters there are.
    """
    paths = _paths(model)
    for pattern in patterns:
        if not any(sharding.path_matches(path, [pattern]) for path in paths):
            raise ValueError(
                f"config.optimizer.frozen: {pattern!r} matches no parameter"
                f"{' (a dense model has no router: set model.num_experts)' if pattern == 'router' else ''}; "
                f"there are {', '.join(map(sharding.path_name, paths))}."
            )
    if all(sharding.path_matches(path, patterns) for path in paths):
        raise ValueError(f"config.optimizer.frozen={tuple(patterns)} leaves no parameter to learn.")
    return tuple(patterns)


def adapters(keys: Mapping[str, typing.Any], model: ModelConfig) -> Lora | None:
    """What ``config.lora`` asks for, None with rank 0; each of its patterns has to match a kernel.

    Raises:
        ValueError: with the kernels there are.
    """
    if not keys["rank"]:
        return None
    wanted = Lora(**keys)
    targets([sharding.path_name(path) for path in _paths(model)], wanted.targets)
    return wanted


def _paths(model: ModelConfig) -> list[tuple]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(transformer.param_shapes(model))]
