"""Reward models: a transformer whose last hidden states give one number a token instead of a distribution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rl_reason.models import transformer
from rl_reason.models.transformer import ModelConfig


def init(key: Key[Array, ""], backbone: PyTree, config: ModelConfig) -> PyTree:
    """{backbone, head {weight [D], bias []}} around a copy of ``backbone``; the head starts uniform in +-D^-0.5."""
    bound = config.hidden_size**-0.5
    weight_key, bias_key = jax.random.split(key)
    draw = lambda key, shape: jax.random.uniform(key, shape, config.param_dtype, -bound, bound)
    head = {"weight": draw(weight_key, (config.hidden_size,)), "bias": draw(bias_key, ())}
    return {"backbone": jax.tree.map(jnp.copy, backbone), "head": head}


def token_logits(
    params: PyTree, tokens: Int[Array, "N T"], valid: Bool[Array, "N T"], config: ModelConfig
) -> Float[Array, "N T"]:
    """The head's number at every token, having read up to and including it; in fp32 or wider. 0 where not ``valid``."""
    hidden = transformer.forward(params["backbone"], tokens, valid, config).hidden
    return jnp.where(valid, logits(params["head"], hidden), 0.0)


def logits(head: PyTree, hidden: Float[Array, "*r D"]) -> Float[Array, "*r"]:
    """The head's number of each hidden state, in fp32 or wider."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return hidden.astype(wide) @ head["weight"].astype(wide) + head["bias"].astype(wide)


def preference_losses(better: Float[Array, " M"], worse: Float[Array, " M"], focal_gamma: float) -> Float[Array, " M"]:
    """-log sigmoid(better - worse) a pair (Bradley-Terry), in nats; POLAR's loss (arXiv:2507.05197).

    Times (1 - 2 max(sigmoid - 1/2, 0))^focal_gamma, which spares pairs that are already told apart; 0 is without.
    """
    delta = better - worse
    sure = jnp.maximum(jax.nn.sigmoid(delta) - 0.5, 0.0)
    return jax.nn.softplus(-delta) * (1.0 - 2.0 * sure) ** focal_gamma
