"""Low-rank adapters (LoRA, arXiv:2106.09685): y = x W + (alpha / rank) (x A) B, where A and B learn and W does not.

They are parameters beside the kernel that they adapt, and a forward uses those that it finds: ``lora_a`` [L in... r],
``lora_b`` [L r out...] and ``lora_scale`` [L], which is alpha / rank. Without them a tree is the base, so that the reference
model of such a run costs nothing. B is 0 at first, and so is what they add. A and B are in fp32 or wider, whatever W is in.

x A and (x A) B are products of their own: of W + A B as one matrix the gradient would be as large as W.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Key, PyTree

from rl_reason.sharding import by_path

LEAVES = ("lora_a", "lora_b", "lora_scale")
BASE = r"^(?!.*/lora_)"  # finds the paths of all but adapters
FROZEN = (BASE, "/lora_scale$")  # and these of all but A and B


@dataclasses.dataclass(frozen=True)
class Lora:
    """``config.lora``."""

    rank: int
    alpha: float
    targets: Sequence[str]  # patterns found in the paths of kernels, as "attention/(q|v)"
    merge_to_sample: bool  # W + A B once a rollout, rounded as W is; or x A and (x A) B at every token

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"config.lora: rank={self.rank} must be at least 1 and alpha={self.alpha} above 0.")


def linear(module: nn.Module, x: Array) -> Array:
    """What a linear layer makes of ``x``, with the adapters that its parameters hold."""
    out = module(x)
    if not module.has_variable("params", "lora_a"):
        return out
    a, b, scale = (module.get_variable("params", name).astype(out.dtype) for name in LEAVES)
    return out + scale * jnp.tensordot(jnp.tensordot(x.astype(out.dtype), a, a.ndim - 1), b, 1)


def add(key: Key[Array, ""], params: PyTree, config: Lora) -> PyTree:
    """The parameters with adapters, A uniform in +-in^-0.5 (as PEFT has it) and B 0.

    Raises:
        ValueError: a target that finds no kernel.
    """
    flat = by_path(params)
    for index, path in enumerate(targets(list(flat), config.targets)):
        layers, *sizes = flat[path].shape
        num_inputs = 2 if path.endswith("attention/out/kernel") else 1  # heads and a head's size
        ins, outs = sizes[:num_inputs], sizes[num_inputs:]
        dtype, bound = jnp.promote_types(flat[path].dtype, jnp.float32), math.prod(ins) ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (layers, *ins, config.rank), dtype, -bound, bound)
        b = jnp.zeros((layers, config.rank, *outs), dtype)
        scale = jnp.full(layers, config.alpha / config.rank, dtype)
        flat |= dict(zip(_beside(path), (a, b, scale), strict=True))
    return unflatten_dict(flat, sep="/")


def targets(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The kernels that the patterns find, in order.

    Raises:
        ValueError: for a pattern that finds none, with the kernels there are.
    """
    kernels = sorted(path for path in paths if path.endswith("/kernel"))
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in kernels):
            raise ValueError(
                f"config.lora.targets: {pattern!r} matches none of the kernels that take adapters, which are "
                f"{', '.join(kernels)}. Routers, experts and embeddings take none."
            )
    return [path for path in kernels if any(re.search(pattern, path) for pattern in patterns)]


def base(params: PyTree) -> PyTree:
    """The parameters without adapters: the same arrays."""
    flat = by_path(params)
    return unflatten_dict({path: x for path, x in flat.items() if not path.endswith(LEAVES)}, sep="/")


def merged(params: PyTree) -> PyTree:
    """The parameters with W + scale A B in place of each W, in W's dtype, and no adapters; of all layers or of one.

    Of all layers one is in fp32 at a time.
    """
    flat = by_path(params)
    kernels = [path for path in flat if path.endswith("/kernel") and _beside(path)[0] in flat]
    if not kernels:
        return params
    for path in kernels:
        given = flat[path], *(flat.pop(name) for name in _beside(path))
        stacked = given[-1].ndim > 0  # of one layer scale is a number
        flat[path] = jax.lax.map(lambda of: _merge(*of), given) if stacked else _merge(*given)
    return unflatten_dict(flat, sep="/")


def _merge(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(a.dtype) + scale * product).astype(kernel.dtype)


def _beside(path: str) -> list[str]:
    return [f"{path.removesuffix('/kernel')}/{name}" for name in LEAVES]
