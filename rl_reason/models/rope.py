"""Rotary positions (arXiv:2104.09864): the pairs (i, i + R/2) of a head turn by position * frequency_i.

R are the channels that turn, the first of a head or all of it. Frequencies are theta^(-2i/R), as they are or rescaled for
longer rows than a model was trained on. Models in which some layers see a window of the row only may turn those by another
theta.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

if typing.TYPE_CHECKING:
    from rl_reason.models.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are rescaled.

    "linear" divides all by ``factor``. "llama3" divides those whose wavelength, 2 pi / frequency tokens, is above
    ``original_max_position / low_freq_factor``, keeps those below ``original_max_position / high_freq_factor``, and goes
    from the one to the other in between (Llama 3.1's reference code).
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position: int = 0

    def __post_init__(self):
        llama3 = self.low_freq_factor, self.high_freq_factor, self.original_max_position
        if self.kind not in ("linear", "llama3") or self.factor <= 0 or (self.kind == "llama3") != all(llama3):
            raise ValueError(
                f"model.rope_scaling={dataclasses.asdict(self)}: want dict(kind='linear', factor) or dict(kind='llama3', "
                "factor, low_freq_factor, high_freq_factor, original_max_position)."
            )

    def __call__(self, frequencies: Float[np.ndarray, " half"]) -> Float[np.ndarray, " half"]:
        """The frequencies, rescaled."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_max_position * frequencies / (2 * math.pi)  # in a row of the original length
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


class Rotation(typing.NamedTuple):
    """Sines and cosines, broadcast over heads."""

    sin: Float[Array, "*r 1 half"]
    cos: Float[Array, "*r 1 half"]


class Rotations(typing.NamedTuple):
    """What all layers need, computed once: ``local`` for layers with a window, None where they turn as the others do."""

    full: Rotation
    local: Rotation | None


def frequencies(theta: float, rotary_dim: int, scaling: RopeScaling | None = None) -> Float[np.ndarray, " half"]:
    """Radians a position, in float64: exact enough for any dtype that follows."""
    half = rotary_dim // 2
    plain = theta ** (-np.arange(half) / half)
    return plain if scaling is None else scaling(plain)


def rotations(positions: Int[Array, "*r"], config: "ModelConfig") -> Rotations:
    """Sines and cosines of all positions, in fp32 or wider."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)

    def of(theta: float, scaling: RopeScaling | None) -> Rotation:
        angle = positions[..., None, None].astype(dtype) * jnp.asarray(
            frequencies(theta, config.rotary_dim or config.head_dim, scaling), dtype
        )
        return Rotation(jnp.sin(angle), jnp.cos(angle))

    full = of(config.rope_theta, config.rope_scaling)
    if not any(config.windowed) or not config.rope_theta_local:
        return Rotations(full, None)
    return Rotations(full, of(config.rope_theta_local, None))


def of_layer(turns: Rotations, windowed: bool | Bool[Array, ""]) -> Rotation:
    """The rotation of a layer with or without a window; which it is may be traced."""
    if turns.local is None or windowed is False:
        return turns.full
    if windowed is True:
        return turns.local
    return jax.tree.map(lambda local, full: jnp.where(windowed, local, full), turns.local, turns.full)


def rotate(x: Float[Array, "*r heads hd"], by: Rotation) -> Float[Array, "*r heads hd"]:
    """Turns the pairs (i, i + half): the half-split layout. Channels behind them stay as they are."""
    half = by.sin.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = [a * by.cos - b * by.sin, b * by.cos + a * by.sin]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1).astype(x.dtype)
