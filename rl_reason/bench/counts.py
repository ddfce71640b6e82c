"""Model FLOPs and bytes of a rollout and an update, counted from shapes alone.

What is counted is what the mathematics needs, not what a program happens to do: padding, recomputation, the masked
half of an attention matrix and idle slots cost time and earn nothing. A product of [m k] and [k n] is 2 m k n FLOPs.
Norms, activations, softmaxes, embedding look-ups, sampling and the optimizer's arithmetic are left out of the FLOPs.
A model that fits a processor's caches can be faster than the bytes here and the memory's copy rate would allow.

    forward  = 2 * (matmul parameters a token uses) * tokens + 2 * D * V * scored tokens + 4 * L * H * hd * context
    update   = 3 * forward * epochs (1 forward, 2 backward) + forward for each of old and reference log-probabilities
    decoding = a forward of every generated token, and of every prompt once without the head

``context`` is the sum over tokens of the positions each attends to, its own included.
"""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rl_reason.models.transformer import ModelConfig, kv_bytes

TRAIN_TO_FORWARD = 3  # FLOPs of forward and backward over those of the forward
ADAM_PASSES = 7  # reads of gradient, parameter and two moments, writes of the latter three


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """Parameters that enter matrix products."""

    layer: int  # of one layer, all experts
    layer_active: int  # of one layer, those that one token uses
    head: int  # the vocabulary head, tied or not


class Work(typing.NamedTuple):
    """What a computation needs: FLOPs, bytes to and from memory, and the tokens it is for."""

    flops: float
    num_bytes: float
    tokens: int

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes, self.tokens + other.tokens)

    def seconds(self, matmul_rate: float, copy_rate: float) -> float:
        """The roofline: the longer of computing at ``matmul_rate`` FLOP/s and moving at ``copy_rate`` bytes/s."""
        return max(self.flops / matmul_rate, self.num_bytes / copy_rate)


def matmul_params(config: ModelConfig) -> Matmuls:
    """Sizes of the weights that multiply activations; norms and embedding look-ups do not."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    expert = 3 * config.hidden_size * config.mlp_size
    head = config.hidden_size * config.vocab_size
    if not config.num_experts:
        return Matmuls(attention + expert, attention + expert, head)
    router = config.hidden_size * config.num_experts
    return Matmuls(
        attention + router + expert * config.num_experts, attention + router + expert * config.experts_per_token, head
    )


def forward_flops(config: ModelConfig, *, tokens: int, scored: int, context: int) -> float:
    """FLOPs of a forward over ``tokens`` tokens of which ``scored`` pass the vocabulary head.

    >>> from configs import base
    >>> sizes = dict(vocab_size=5, num_layers=1, hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=2, mlp_size=3)
    >>> model = ModelConfig.of(base.get_config().model.to_dict() | sizes)
    >>> forward_flops(model, tokens=1, scored=1, context=1)  # 2 * (4 * 4 + 3 * 6) + 2 * 10 + 4 * 2
    96.0
    """
    weights = matmul_params(config)
    products = 2.0 * config.num_layers * weights.layer_active * tokens + 2.0 * weights.head * scored
    return products + 4.0 * config.num_layers * config.num_heads * config.head_dim * context


def causal_context(lengths: Int[np.ndarray, " n"]) -> int:
    """Positions attended to by rows of these lengths: n (n + 1) / 2 each.

    >>> causal_context(np.array([1, 3]))
    7
    """
    lengths = np.asarray(lengths, np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def experts_read(config: ModelConfig, rows: int) -> float:
    """Experts of a layer whose weights ``rows`` tokens touch, if each draws its own evenly."""
    if not config.num_experts:
        return 0.0
    return config.num_experts * (1.0 - (1.0 - config.experts_per_token / config.num_experts) ** rows)


def decode_weight_bytes(config: ModelConfig, rows: int) -> float:
    """Bytes of weights that a decode step of ``rows`` rows reads, head included, in the activation dtype."""
    weights = matmul_params(config)
    layer = float(weights.layer)
    if config.num_experts:
        expert = 3 * config.hidden_size * config.mlp_size
        layer += expert * (experts_read(config, rows) - config.num_experts)
    return (config.num_layers * layer + weights.head) * jnp.dtype(config.dtype).itemsize


def rollout_work(
    config: ModelConfig,
    prompt_lens: Int[np.ndarray, " B"],
    completion_lens: Int[np.ndarray, " N"],
    *,
    decode_steps: int,
    rows_per_step: int,
) -> Work:
    """Prefill of B prompts, once each, and decoding of N completions (row n belongs to prompt n // (N / B)).

    Bytes: all weights once for the prefill and once a decode step; each step reads the keys and values of every row's
    prompt and completion so far, and writes one position. Tokens are those generated.
    """
    prompts, generated = np.asarray(prompt_lens, np.int64), np.asarray(completion_lens, np.int64)
    own = np.repeat(prompts, len(generated) // len(prompts))
    # A row's t-th token is drawn by feeding the one before it, at position own - 1 + t.
    context = int((generated * own + generated * (generated - 1) // 2).sum())
    tokens = int(generated.sum())
    prefill = forward_flops(config, tokens=int(prompts.sum()), scored=0, context=causal_context(prompts))
    decode = forward_flops(config, tokens=tokens, scored=tokens, context=context)
    weights = decode_weight_bytes(config, rows_per_step) * decode_steps
    weights += config.num_layers * matmul_params(config).layer * jnp.dtype(config.dtype).itemsize
    traffic = kv_bytes(config) * (context + tokens + int(prompts.sum()))
    return Work(prefill + decode, float(weights + traffic), tokens)


def update_work(
    config: ModelConfig,
    prompt_lens: Int[np.ndarray, " N"],
    completion_lens: Int[np.ndarray, " N"],
    *,
    epochs: int,
    scorings: int,
    updates: int,
    passes: int,
) -> Work:
    """Training on N rows.

    Bytes: parameters read by each forward and each backward and a gradient written, for each of ``passes``
    microbatches; ADAM_PASSES times the parameters for each of ``updates``; activations are taken to stay on chip.
    ``scorings`` counts the forwards for old and reference log-probabilities. Tokens are prompts' and completions'.
    """
    prompts, generated = np.asarray(prompt_lens, np.int64), np.asarray(completion_lens, np.int64)
    tokens, scored = int((prompts + generated).sum()), int(generated.sum())
    forward = forward_flops(config, tokens=tokens, scored=scored, context=causal_context(prompts + generated))
    weights = matmul_params(config)
    size = config.num_layers * weights.layer + weights.head
    size *= jnp.dtype(config.param_dtype).itemsize
    reads = 3 * passes + ADAM_PASSES * updates + scorings
    return Work(forward * (TRAIN_TO_FORWARD * epochs + scorings), float(reads * size), tokens)
