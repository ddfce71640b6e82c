"""Per-token covariance of log-probability and advantage (Cui et al. 2025, arXiv:2505.22617, eq. 10)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def covariance(
    logprob: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    axis_names: tuple[str, ...] = (),
) -> Float[Array, "N T"]:
    """``(A - mean A) (logprob - mean logprob)``, means over the global masked set; 0 off the mask.

    Both arguments are detached here: the covariance chooses tokens, it is not a loss. Inside ``shard_map``, name in
    ``axis_names`` the mesh axes that the rows are spread over; elsewhere leave it empty. Entries off the mask may be
    anything, NaN included. An empty mask gives zeros.

    >>> import jax.numpy as jnp
    >>> covariance(jnp.array([[-1.0, -3.0, 9.0]]), jnp.array([[1.0, -1.0, 9.0]]), jnp.array([[True, True, False]]))
    Array([[1., 1., 0.]], dtype=float32)
    """
    logprob, advantages = jax.lax.stop_gradient((logprob, advantages))

    def total(x):
        return jax.lax.psum(jnp.sum(x), axis_names) if axis_names else jnp.sum(x)

    def centred(x, count):
        x = jnp.where(mask, x, 0)
        return x - total(x) / count

    count = jnp.maximum(total(mask.astype(jnp.int32)), 1).astype(logprob.dtype)
    return jnp.where(mask, centred(advantages, count) * centred(logprob, count), 0)
