"""What kernels for TPUs have in common."""

import jax
import jax.numpy as jnp

LANES = 128  # of a vector register
VMEM_BYTES = 12 * 2**20  # of blocks, two of each in flight: below the smallest generation's 16 MiB of scoped memory


def keep(x: jax.Array, axis: int, count: jax.Array) -> jax.Array:
    """The first ``count`` along an axis, zeros after: what lies past an array's end may be anything."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, 0)
