"""A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, a gated feed-forward or a mixture of experts.

Qwen 2 and 3, Llama 3, Gemma 2 and 3, GLM-4, InternLM3, Mixtral and Intern-S1's language models are one function;
``ModelConfig`` says where they part. ``configs/models.py`` has their values.

Parameters are always stored stacked, [L, ...], and applied either by ``lax.scan`` or by a Python loop over layers. One
``Block`` serves training, prefill and decoding: what differs is the ``attend`` function it is given.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason.models import rope
from rl_reason.models.attention import Attend, AttendRows, causal_attention
from rl_reason.models.lora import linear
from rl_reason.models.moe import MixtureOfExperts, RouterStatistics
from rl_reason.models.rope import RopeScaling
from rl_reason.sharding import ROWS, constrain

ACTIVATIONS: dict[str, Callable] = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
# What the backward pass of a layer finds stored: everything; nothing but its input; products of weights; or attention's
# outcome, so that only scores are never computed twice.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "context": jax.checkpoint_policies.save_only_these_names("context"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes, function and dtypes of one model. Sizes in units, lengths in tokens; ``num_experts`` 0 is a dense model."""

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
    activation: str  # of the feed-forward's gate
    qkv_bias: bool
    qk_norm: bool  # RMSNorm on the queries and keys of each head
    post_norms: bool  # RMSNorm on what attention and feed-forward give, too
    norm_plus_one: bool  # norms multiply by 1 + their parameter
    scale_embeddings: bool  # by sqrt(hidden_size)
    query_scale: float  # 0: head_dim^-0.5
    attention_soft_cap: float  # c tanh(score / c); 0: none
    final_soft_cap: float  # the same of logits
    rope_scaling: RopeScaling | None  # of layers without a window
    rope_theta_local: float  # of layers with a window; 0: rope_theta
    rotary_dim: int  # channels of a head that turn, its first; 0: all
    window: int  # positions that a token sees, its own included; 0: all
    full_every: int  # with a window, each so-many-th layer sees all; 0: none does
    max_position: int  # the longest row the model is meant for; 0: any
    dtype: str  # of activations
    param_dtype: str
    scan_layers: bool  # training and prefill: lax.scan over the stack, or a Python loop
    scan_decode: bool  # decoding: one stacked cache and a scan (TPU), or one cache a layer and a loop (CPU, GPU)
    remat: str  # a key of REMAT

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs.")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim < self.head_dim:
            raise ValueError(
                f"model.rotary_dim={self.rotary_dim} must be even and below head_dim={self.head_dim}; 0 is all of a head."
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"model.experts_per_token={self.experts_per_token} is not in 1..{self.num_experts}.")
        for key, known in (("activation", ACTIVATIONS), ("remat", REMAT)):
            if getattr(self, key) not in known:
                raise ValueError(f"model.{key}={getattr(self, key)!r}; there are {', '.join(known)}.")
        if self.full_every and not self.window:
            raise ValueError(f"model.full_every={self.full_every} needs a model.window, which the other layers have.")

    @classmethod
    def of(cls, keys: Mapping[str, typing.Any]) -> "ModelConfig":
        """From the keys of ``config.model``, where ``rope_scaling`` is a mapping or None."""
        scaling = keys["rope_scaling"]
        return cls(**{**keys, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer sees a window of the row only."""
        full = lambda index: not self.full_every or (index + 1) % self.full_every
        return tuple(bool(self.window and full(index)) for index in range(self.num_layers))

    def attends(self, windowed: bool | Bool[Array, ""]) -> dict[str, typing.Any]:
        """How a layer with or without a window attends: keywords of ``causal_attention`` and ``decode_attention``.

        Which of the two it is may be traced; a window that is none then ends beyond any row.
        """
        beyond = jnp.iinfo(jnp.int32).max // 2
        window = (self.window if windowed else None) if isinstance(windowed, bool) else None
        if not isinstance(windowed, bool):
            window = jnp.where(windowed, self.window, beyond)
        scale = self.query_scale or self.head_dim**-0.5
        return dict(scale=scale, soft_cap=self.attention_soft_cap or None, window=window)


def rms_norm(x: Float[Array, "*r D"], weight: Float[Array, " D"], config: ModelConfig) -> Float[Array, "*r D"]:
    """x / rms(x) * weight (arXiv:1910.07467), or 1 + weight; in fp32 or wider, given in the activation dtype."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    weight = jnp.expand_dims(weight.astype(wide) + config.norm_plus_one, range(x.ndim - 1))
    x = x.astype(wide)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * weight
    return (x * scale).astype(config.dtype)


class Norm(nn.Module):
    """RMSNorm over the last axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        start = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        return rms_norm(x, self.param("scale", start, x.shape[-1:], c.param_dtype), c)


class Attention(nn.Module):
    """Grouped-query attention; ``attend`` decides where queries and keys are and what they see."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, attend: Attend):
        c = self.config
        dense = functools.partial(nn.DenseGeneral, dtype=c.dtype, param_dtype=c.param_dtype)
        heads = lambda count, name: linear(dense((count, c.head_dim), use_bias=c.qkv_bias, name=name), x)
        q, k, v = heads(c.num_heads, "q"), heads(c.num_kv_heads, "k"), heads(c.num_kv_heads, "v")
        if c.qk_norm:
            q, k = Norm(c, name="q_norm")(q), Norm(c, name="k_norm")(k)
        out, cache = attend(q, k, v)
        out = checkpoint_name(out, "context")
        return linear(dense(c.hidden_size, axis=(-2, -1), use_bias=False, name="out"), out), cache


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=c.dtype, param_dtype=c.param_dtype)
        gate, up = (linear(dense(c.mlp_size, name=name), x) for name in ("gate", "up"))
        return linear(dense(c.hidden_size, name="down"), ACTIVATIONS[c.activation](gate) * up)


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
        after = lambda x, name: Norm(c, name=name)(x) if c.post_norms else x
        attended, cache = Attention(c, name="attention")(Norm(c, name="attention_norm")(x), attend)
        x = x + after(attended, "attention_post_norm")
        h = Norm(c, name="mlp_norm")(x)
        if c.num_experts:
            fed, router, experts = MixtureOfExperts(c, name="moe")(h, valid, recorded)
        else:
            fed, router, experts = FeedForward(c, name="mlp")(h), None, None
        return x + after(fed, "mlp_post_norm"), cache, router, experts


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
        "final_norm": jnp.full(config.hidden_size, 0.0 if config.norm_plus_one else 1.0, config.param_dtype),
    }
    if not config.tie_embeddings:
        params["unembed"] = jax.random.normal(unembed_key, shape[::-1], config.param_dtype) * scale
    return params


def embed(params: PyTree, tokens: Int[Array, "*r"], config: ModelConfig) -> Float[Array, "*r D"]:
    """Token embeddings in the activation dtype; scaled by sqrt(D), they start at unit size also where they are tied."""
    x = params["embed"].astype(config.dtype)[tokens]
    return x * config.hidden_size**0.5 if config.scale_embeddings else x


def unembedding(params: PyTree, config: ModelConfig) -> Float[Array, "D V"]:
    """The vocabulary head's weight."""
    weight = params["embed"].T if config.tie_embeddings else params["unembed"]
    return weight.astype(config.dtype)


def final_norm(params: PyTree, x: Float[Array, "*r D"], config: ModelConfig) -> Float[Array, "*r D"]:
    """RMSNorm before the head."""
    return rms_norm(x, params["final_norm"], config)


def logits(hidden: Float[Array, "*r D"], head: Float[Array, "D V"], config: ModelConfig) -> Float[Array, "*r V"]:
    """What the vocabulary head, ``unembedding``, makes of normed hidden states; in fp32 or wider."""
    z = jnp.matmul(hidden, head, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))
    return config.final_soft_cap * jnp.tanh(z / config.final_soft_cap) if config.final_soft_cap else z


def layer(stacked: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """One layer of a stack."""
    return jax.tree.map(lambda x: x[index], stacked)


def forward(
    params: PyTree,
    tokens: Int[Array, "N T"],
    valid: Bool[Array, "N T"],
    config: ModelConfig,
    attend: AttendRows = causal_attention,
    expert_ids: Int[Array, "N LK T"] | None = None,
) -> Hidden:
    """Hidden states of contiguous rows (position = column); ``valid`` keeps padding out of router statistics.

    ``expert_ids`` are experts to use in place of the routers' choice, -1 where they choose for themselves: K of each layer,
    before the tokens, because a last axis of K takes 128 places in a TPU's memory.
    """
    rows, width = tokens.shape
    turns = rope.rotations(jnp.arange(width), config)

    def apply_block(windowed, x, layer_of):
        layer_params, recorded = layer_of
        turn, how = rope.of_layer(turns, windowed), config.attends(windowed)
        if recorded is not None:
            recorded = jnp.swapaxes(recorded, 1, 2).reshape(rows * width, -1)

        def attend_rows(q, k, v):
            q, k, v = (x.reshape(rows, width, *x.shape[1:]) for x in (q, k, v))
            context, kept = attend(rope.rotate(q, turn), rope.rotate(k, turn), v, **how)
            return context.reshape(rows * width, *context.shape[2:]), kept

        out = Block(config).apply({"params": layer_params}, x, attend_rows, valid.reshape(-1), recorded)
        x, cache, router, _ = typing.cast(tuple, out)
        return constrain(x, ROWS), (cache, router)

    def checkpointed(body: Callable) -> Callable:
        return body if config.remat == "none" else jax.checkpoint(body, policy=REMAT[config.remat])

    recorded = None
    if expert_ids is not None:
        recorded = jnp.moveaxis(expert_ids.reshape(rows, config.num_layers, -1, width), 1, 0)
    layers = (params["layers"], recorded)
    x = constrain(embed(params, tokens.reshape(-1), config), ROWS)
    kinds = set(config.windowed)
    bodies = {kind: checkpointed(functools.partial(apply_block, kind)) for kind in kinds}
    if config.scan_layers and len(kinds) == 1:
        x, (cache, router) = jax.lax.scan(bodies[kinds.pop()], x, layers)
    elif config.scan_layers:
        body = checkpointed(lambda x, of: apply_block(of[0], x, of[1]))
        x, (cache, router) = jax.lax.scan(body, x, (jnp.array(config.windowed), layers))
    else:
        kept = []
        for index, kind in enumerate(config.windowed):
            x, out = bodies[kind](x, layer(layers, index))
            kept.append(out)
        cache, router = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
    return Hidden(final_norm(params, x, config).reshape(rows, width, -1), cache, router)


@functools.cache
def param_shapes(config: ModelConfig) -> PyTree:
    """The parameters' shapes and dtypes, without memory."""
    return jax.eval_shape(functools.partial(init, config=config), jax.random.key(0))


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of one position's keys and values, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize


def num_params(config: ModelConfig) -> tuple[int, int]:
    """(all parameters, those a token uses), from shapes alone."""
    shapes = param_shapes(config)
    total = sum(x.size for x in jax.tree.leaves(shapes))
    if not config.num_experts:
        return total, total
    experts = sum(shapes["layers"]["moe"][name].size for name in ("gate", "up", "down"))
    return total, total - experts + experts * config.experts_per_token // config.num_experts
