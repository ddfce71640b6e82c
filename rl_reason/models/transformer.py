"""A decoder-only transformer: RMSNorm, RoPE, grouped-query attention with QK-norm, SwiGLU or a mixture of experts.

Parameters are always stored stacked, [L, ...], and applied either by ``lax.scan`` or by a Python loop over layers. One
``Block`` serves training, prefill and decoding: what differs is the ``attend`` function it is given.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason.models.attention import Attend, causal_attention
from rl_reason.models.moe import MixtureOfExperts, RouterStatistics
from rl_reason.sharding import ROWS, constrain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and dtypes of one model. Sizes in units; ``num_experts`` 0 is a dense model."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    num_experts: int
    experts_per_token: int
    dtype: str  # of activations
    param_dtype: str
    scan_layers: bool  # training and prefill: lax.scan over the stack, or a Python loop
    scan_decode: bool  # decoding: one stacked cache and a scan (TPU), or one cache a layer and a loop (CPU, GPU)
    remat: bool

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs.")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"model.experts_per_token={self.experts_per_token} is not in 1..{self.num_experts}.")


class Rotation(typing.NamedTuple):
    """RoPE's sines and cosines, computed once and used by every layer; broadcast over heads."""

    sin: Float[Array, "*r 1 half"]
    cos: Float[Array, "*r 1 half"]


def rotation(positions: Int[Array, "*r"], config: ModelConfig) -> Rotation:
    """Angles position * theta^(-2i/hd) (arXiv:2104.09864)."""
    half = config.head_dim // 2
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    angle = positions[..., None, None].astype(dtype) * config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half)
    return Rotation(jnp.sin(angle), jnp.cos(angle))


def rotate(x: Float[Array, "*r heads hd"], by: Rotation) -> Float[Array, "*r heads hd"]:
    """Turns the pairs (i, i + hd/2): the half-split layout."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on queries and keys; ``attend`` decides where they are and what they see."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, attend: Attend):
        c = self.config
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype)
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype)
        q = norm(name="q_norm")(dense((c.num_heads, c.head_dim), name="q")(x))
        k = norm(name="k_norm")(dense((c.num_kv_heads, c.head_dim), name="k")(x))
        v = dense((c.num_kv_heads, c.head_dim), name="v")(x)
        out, cache = attend(q, k, v)
        return dense(c.hidden_size, axis=(-2, -1), name="out")(out), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype)
        hidden = nn.silu(dense(c.mlp_size, name="gate")(x)) * dense(c.mlp_size, name="up")(x)
        return dense(c.hidden_size, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm attention and feed-forward over tokens [M D], whatever rows they come from.

    One flat axis, because a weight's gradient then contracts one: over two, XLA transposes the activations first, and an
    update on a CPU takes 1.7 times as long. Returns (x, whatever ``attend`` kept, router statistics or None, the experts of
    each token [M K] or None); ``recorded`` experts replace the router's choice.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, attend: Attend, valid, recorded=None):
        c = self.config
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype)
        attended, cache = Attention(c, name="attention")(norm(name="attention_norm")(x), attend)
        x = x + attended
        h = norm(name="mlp_norm")(x)
        if c.num_experts:
            fed, router, experts = MixtureOfExperts(c, name="moe")(h, valid, recorded)
        else:
            fed, router, experts = SwiGLU(c, name="mlp")(h), None, None
        return x + fed, cache, router, experts


class Hidden(typing.NamedTuple):
    """What a full forward gives: final hidden states, each layer's kept cache, and router statistics."""

    hidden: Float[Array, "N T D"]
    cache: PyTree
    router: RouterStatistics | None


def init(key: Key[Array, ""], config: ModelConfig) -> PyTree:
    """Parameters: {embed [V D], layers {... [L ...]}, final_norm [D], unembed [D V] unless tied}."""
    embed_key, unembed_key, layers_key = jax.random.split(key, 3)
    x, valid = jnp.zeros((2, config.hidden_size), config.dtype), jnp.ones(2, bool)

    def init_layer(key):
        return Block(config).init(key, x, lambda q, k, v: (q, None), valid)["params"]

    scale = config.hidden_size**-0.5
    shape = (config.vocab_size, config.hidden_size)
    params = {
        "embed": jax.random.normal(embed_key, shape, config.param_dtype) * scale,
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": jnp.ones(config.hidden_size, config.param_dtype),
    }
    if not config.tie_embeddings:
        params["unembed"] = jax.random.normal(unembed_key, shape[::-1], config.param_dtype) * scale
    return params


def embed(params: PyTree, tokens: Int[Array, "*r"], config: ModelConfig) -> Float[Array, "*r D"]:
    """Token embeddings in the activation dtype; tied ones are scaled by sqrt(D) so that they start at unit size."""
    x = params["embed"].astype(config.dtype)[tokens]
    return x * config.hidden_size**0.5


def unembedding(params: PyTree, config: ModelConfig) -> Float[Array, "D V"]:
    """The vocabulary head's weight."""
    weight = params["embed"].T if config.tie_embeddings else params["unembed"]
    return weight.astype(config.dtype)


def final_norm(params: PyTree, x: Float[Array, "*r D"], config: ModelConfig) -> Float[Array, "*r D"]:
    """RMSNorm before the head."""
    norm = nn.RMSNorm(epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype)
    return norm.apply({"params": {"scale": params["final_norm"]}}, x)  # type: ignore[return-value]


def layer(stacked: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """One layer of a stack."""
    return jax.tree.map(lambda x: x[index], stacked)


def forward(
    params: PyTree,
    tokens: Int[Array, "N T"],
    valid: Bool[Array, "N T"],
    config: ModelConfig,
    attend: Attend = causal_attention,
    expert_ids: Int[Array, "N T L K"] | None = None,
) -> Hidden:
    """Hidden states of contiguous rows (position = column); ``valid`` keeps padding out of router statistics.

    ``expert_ids`` are experts to use in place of the routers' choice, -1 where they choose for themselves.
    """
    rows, width = tokens.shape
    turn = rotation(jnp.arange(width), config)

    def attend_rows(q, k, v):
        q, k, v = (x.reshape(rows, width, *x.shape[1:]) for x in (q, k, v))
        context, kept = attend(rotate(q, turn), rotate(k, turn), v)
        return context.reshape(rows * width, *context.shape[2:]), kept

    def apply_block(x, layer_of):
        layer_params, recorded = layer_of
        out = Block(config).apply({"params": layer_params}, x, attend_rows, valid.reshape(-1), recorded)
        x, cache, router, _ = typing.cast(tuple, out)
        return constrain(x, ROWS), (cache, router)

    recorded = (
        None if expert_ids is None else jnp.moveaxis(expert_ids, 2, 0).reshape(config.num_layers, rows * width, -1)
    )
    layers = (params["layers"], recorded)
    x = constrain(embed(params, tokens.reshape(-1), config), ROWS)
    body: Callable = jax.checkpoint(apply_block) if config.remat else apply_block
    if config.scan_layers:
        x, (cache, router) = jax.lax.scan(body, x, layers)
    else:
        kept = []
        for index in range(config.num_layers):
            x, out = body(x, layer(layers, index))
            kept.append(out)
        cache, router = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
    return Hidden(final_norm(params, x, config).reshape(rows, width, -1), cache, router)


def num_params(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those a token uses), from shapes alone."""
    shapes = jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(shapes))
    if not config.num_experts:
        return total, total
    experts = sum(shapes["layers"]["moe"][name].size for name in ("gate", "up", "down"))
    return total, total - experts + experts * config.experts_per_token // config.num_experts
