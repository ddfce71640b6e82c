"""The vocabulary head over a mesh: each device scores its own rows against its own part of the vocabulary.

The weight is gathered over fsdp and expert once, and its gradient reduced and scattered; over ``tensor`` three numbers a row
cross, never a logit. With p_i the probability of device i's part, h_i the entropy and l_i(y) a log-probability within it:

    log p(y) = l_i(y) + log p_i  of the part that y is in,     H = sum_i p_i (h_i - log p_i)

both with an absolute error of a rounding of 1, where one device's is relative.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.entropy_covariance import token_statistics
from rl_reason.sharding import ROWS, num_row_shards, param_spec


def score_tokens(
    hidden: Float[Array, "M D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, " M"],
    temperature: Float[Array, ""] | float,
    soft_cap: float | None,
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """(log-probability, entropy) in nats, as ``token_statistics`` has them, on the mesh in use if it divides the rows."""
    statistics = functools.partial(token_statistics, soft_cap=soft_cap)
    mesh = jax.sharding.get_abstract_mesh()
    if dispatch.on_one_device() or len(hidden) % num_row_shards(mesh):
        out = statistics(hidden, unembedding, targets, temperature=temperature)
        return out.logprob, out.entropy
    stored = param_spec("unembed", unembedding.shape, mesh)

    def body(hidden, weight, targets, temperature):
        weight = dispatch.varying(weight, hidden)  # so that its gradient is scattered before it is summed over data
        if stored[0] is not None:
            weight = jax.lax.all_gather(weight, stored[0], axis=0, tiled=True)
        if stored[1] is None:
            out = statistics(hidden, weight, targets, temperature=temperature)
            return out.logprob, out.entropy
        local = targets - jax.lax.axis_index("tensor") * weight.shape[1]
        return _merged(statistics(hidden, weight, local, temperature=temperature), local, weight.shape[1])

    rows = P(ROWS)
    cut = jax.shard_map(body, in_specs=(rows, stored, rows, P()), out_specs=(rows, rows))
    return cut(hidden, unembedding, targets, jnp.asarray(temperature))


def _merged(own, local, width):
    """What the parts along ``tensor`` say together. ``local`` targets are a part's own if they lie in its ``width``."""
    parts = jax.nn.log_softmax(jax.lax.all_gather(own.logsumexp, "tensor"), axis=0)
    part = parts[jax.lax.axis_index("tensor")]
    here = (local >= 0) & (local < width)
    logprob = jnp.where(here, own.logprob + part, 0)
    entropy = jnp.exp(part) * (own.entropy - part)
    return jax.lax.psum((logprob, entropy), "tensor")
