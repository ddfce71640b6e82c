"""Which positions of which cache a row sees, as kernels ask for it."""

import jax
import jax.numpy as jnp

from kernels.integers import div


def prompt_entry(row: jax.Array, index: jax.Array, num_rows: int, num_prompts: int, num_shards: int) -> jax.Array:
    """The prompts' entry that row ``row`` calls ``index``, which counts within the row's own shard."""
    rows, prompts = num_rows // num_shards, num_prompts // num_shards
    return div(row, rows) * prompts + jnp.clip(index, 0, prompts - 1)


def bounds(length: jax.Array, size: int, total: jax.Array, window: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(start, end): the first ``length`` of ``size`` positions, of them the last ``window`` of ``total`` in all caches."""
    end = jnp.minimum(length, size)
    return jnp.zeros_like(end) if window is None else jnp.maximum(total - window, 0), end
