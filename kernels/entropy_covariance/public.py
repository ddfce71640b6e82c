"""Log-probability and entropy of tokens under a vocabulary head, without a second [N, V] array.

Forward / forward and backward in ms (plain = log_softmax and autodiff). fp32 on 2 busy CPU cores, interleaved runs:

    N, D, V                plain         reference     row_blocks_xla    chunked_xla
    512, 64, 512           0.8 / 2.1     0.8 / 1.6     0.8 / 1.7         0.8 / 1.6
    2048, 64, 512          3.3 / 9.6     3.2 / 6.5     3.2 / 8.1         3.7 / 6.9
    6144, 64, 512          10.7 / 53     23 / 32       9.1 / 21          27 / 39
    6144, 128, 2048        81 / 214      120 / 184     48 / 128          135 / 200
    2048, 128, 16384       175 / 441     207 / 321     87 / 242          179 / 312

bf16 on one H200, with GB of temporary memory in the backward pass (one run a line):

    N, D, V                plain               reference           chunked_xla         pallas_hopper
    16384, 2048, 151936    24.0 / 102 (29.9)   20.1 / 53 (14.9)    25.4 / 79 (0.6)     15.6 / 60 (1.4)
    12288, 1024, 151936                        10.0 / 23.9 (11.2)  14.2 / 36.7 (0.5)   6.4 / 24.4 (1.2)
    12288, 2048, 32000                         3.2 / 8.6 (2.4)     4.1 / 12.4 (0.7)    2.5 / 8.0 (1.6)
    2048, 2048, 151936                         2.7 / 7.0 (1.9)     3.7 / 10.5 (0.8)    1.9 / 6.5 (0.7)
    512, 2048, 151936                          0.67 / 2.06 (0.2)   1.01 / 2.75 (0.7)   0.51 / 1.96 (0.2)
    256, 1024, 151936                          0.25 / 0.78 (0.1)   0.35 / 0.89 (0.1)   0.15 / 0.73 (0.1)

Where logits are many, the fastest backward pass is the one that keeps all of them: ask for "reference" by name.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.entropy_covariance import chunked_xla, pallas_hopper, pallas_tpu, reference, row_blocks_xla
from kernels.entropy_covariance.logits import Head

# One entry an implementation; a backend is one more file and one more line here and in `_choose`.
IMPLEMENTATIONS = {
    "reference": reference.token_statistics,
    "row_blocks_xla": row_blocks_xla.token_statistics,
    "chunked_xla": chunked_xla.token_statistics,
    "pallas_tpu": pallas_tpu.token_statistics,
    "pallas_hopper": pallas_hopper.token_statistics,
}

# Bytes of fp32 logits on a device up to which all at once are faster than blocks that are computed twice.
FULL_LOGITS_BYTES = {"cpu": 2**22}
OTHER_FULL_LOGITS_BYTES = 2**28
HOPPER_LOGITS_BYTES = 2**27  # and from which Hopper's kernel is faster than either
ROW_BLOCKS_VOCAB = 2**15  # on a CPU, up to this vocabulary blocks of rows win over blocks of columns


class TokenStatistics(NamedTuple):
    """Per-token statistics of softmax(logits / temperature), nats; fp32, or fp64 for fp64 inputs."""

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]
    logsumexp: Float[Array, " N"]


def token_statistics(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    temperature: float | Float[Array, ""],
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    row_shards: int = 1,
    vocab_shards: int = 1,
    implementation: str | None = None,
) -> TokenStatistics:
    """Statistics of ``z = soft_cap tanh(hidden @ unembedding / soft_cap) / temperature``.

    ``logprob = z[target] - logsumexp(z)``, ``entropy = -sum p log p``, both in nats and differentiable with respect to
    ``hidden`` and ``unembedding`` (as is ``logsumexp``); ``temperature`` may be traced and is a constant. Products
    accumulate in fp32 at least. Logits of -inf have probability 0 and add nothing; columns from ``vocab_size`` on are
    padding and count as -inf. A target outside ``0 .. V - 1`` matches no column: its row's entropy and logsumexp hold
    and its logprob is ``-logsumexp``, finite, to be masked by the caller. A row without a finite logit gives -inf and
    NaN.

    ``implementation``: "reference" (full logits), "row_blocks_xla" (blocks of rows), "chunked_xla" (blocks of the
    vocabulary; like the former never [N, V], recomputed in the backward pass), "pallas_tpu" (a kernel for one TPU, with the
    backward pass of "chunked_xla"), "pallas_hopper" (kernels for one GPU of compute capability 9.0, bf16 or fp16, D and
    V multiples of 64) or None: by size, where this process's devices are such GPUs "pallas_hopper", if it takes the
    operands and no mesh of several devices is in use (``jax.set_mesh``) but inside ``shard_map``: no compiler cuts a kernel
    over devices. Rows and vocabulary may be sharded by the compiler: ``row_shards`` and
    ``vocab_shards`` then say over how many devices each, so that sizes are judged per device and "chunked_xla" cuts its
    blocks inside every shard of the vocabulary and moves no column.
    """
    vocab = unembedding.shape[1]
    vocab_size = vocab if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= vocab:
        raise ValueError(
            f"token_statistics: vocab_size={vocab_size} must lie in 1 .. {vocab}, the columns of unembedding"
        )
    if vocab_shards < 1 or vocab % vocab_shards:
        raise ValueError(
            f"token_statistics: vocab_shards={vocab_shards} must divide the {vocab} columns of unembedding; "
            "pad them and name the real number as vocab_size"
        )
    if row_shards < 1:
        raise ValueError(f"token_statistics: row_shards={row_shards} must be at least 1, the default")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"token_statistics: soft_cap={soft_cap} must be positive; None for no cap")
    if implementation is not None:
        function = dispatch.named("token_statistics", IMPLEMENTATIONS, implementation)
    else:
        logits_bytes = 4 * (hidden.shape[0] // row_shards) * (vocab // vocab_shards)
        name = _choose(logits_bytes, vocab // vocab_shards)
        fits = not pallas_hopper.unfit(hidden, unembedding, row_shards, vocab_shards)
        on_hopper = fits and dispatch.on_hopper() and dispatch.on_one_device()
        hopper = on_hopper and logits_bytes >= HOPPER_LOGITS_BYTES
        function = functools.partial(_hopper_if_cuda, name) if hopper else IMPLEMENTATIONS[name]
    head = Head(jax.lax.stop_gradient(jnp.asarray(temperature)), soft_cap, vocab_size)
    hidden, unembedding, targets = dispatch.alike(hidden, unembedding, targets.astype(jnp.int32))
    return TokenStatistics(*function(hidden, unembedding, targets, head, row_shards, vocab_shards))


def _choose(logits_bytes: int, vocab: int) -> str:
    """By what one device holds; see the measurements in the module docstring."""
    platform = dispatch.platform()
    if logits_bytes <= FULL_LOGITS_BYTES.get(platform, OTHER_FULL_LOGITS_BYTES):
        return "reference"
    return "row_blocks_xla" if platform == "cpu" and vocab <= ROW_BLOCKS_VOCAB else "chunked_xla"


def _hopper_if_cuda(otherwise, hidden, unembedding, targets, head, row_shards, vocab_shards):
    """Decided when lowered: a process with a GPU may be compiling for its CPU."""

    def bound(name):
        def function(hidden, unembedding, targets, temperature):
            parts = head._replace(temperature=temperature), row_shards, vocab_shards
            return IMPLEMENTATIONS[name](hidden, unembedding, targets, *parts)

        return function

    operands = hidden, unembedding, targets, head.temperature
    return jax.lax.platform_dependent(*operands, cuda=bound("pallas_hopper"), default=bound(otherwise))
