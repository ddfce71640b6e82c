"""Which tensors of a Hugging Face checkpoint are which parameter: one table, and what differs in a few families.

Axes: V vocabulary, D hidden, H query heads, K key heads, h a head's size, F feed-forward, E experts. A word of ``theirs``
is one axis of the tensor, which merges ours in that order: torch keeps a linear map as [out, in], so a query's [D H h]
is its [Hh D].
"""

import math
import typing
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from jaxtyping import PyTree

from rl_reason.models.transformer import ModelConfig
from rl_reason.sharding import by_path


class Tensor(typing.NamedTuple):
    """A tensor's name, and how its axes are made of those of a parameter, or of one layer or expert of it."""

    name: str  # {e} is the expert
    ours: str
    theirs: str
    rows: tuple[int, int] = (0, 1)  # which of how many parameters that lie above each other in the tensor
    turned: int = 0  # the first channels of a head (h, ours's last axis), in pairs that lie side by side: GLM's order

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape for a (piece of a) parameter's."""
        sizes = dict(zip(self.ours, ours, strict=True))
        return tuple(math.prod(sizes[axis] for axis in word) for word in self.theirs.split())

    def to_ours(self, x: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """The tensor as a view in our layout."""
        sizes, order = dict(zip(self.ours, ours, strict=True)), self.theirs.replace(" ", "")
        view = x.reshape([sizes[axis] for axis in order]).transpose([order.index(axis) for axis in self.ours])
        return view[..., halves(self.turned, ours[-1])] if self.turned else view

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """The inverse; contiguous."""
        order = self.theirs.replace(" ", "")
        turned = self.channels_to_theirs(x).transpose([self.ours.index(axis) for axis in order])
        return np.ascontiguousarray(turned).reshape(self.shape(x.shape))

    def channels_to_theirs(self, x: np.ndarray) -> np.ndarray:
        """The last axis, a head's channels where some turn, in their order."""
        return x[..., np.argsort(halves(self.turned, x.shape[-1]))] if self.turned else x


def halves(turned: int, size: int) -> np.ndarray:
    """Where the channels of a head are in GLM's order: first those that begin a pair, then those that end one.

    >>> halves(4, 6).tolist()
    [0, 2, 1, 3, 4, 5]
    """
    return np.r_[0:turned:2, 1:turned:2, turned:size]


HEAD = "lm_head.weight"
OUTSIDE = {  # of the layers; the head's name has no prefix
    "embed": Tensor("embed_tokens.weight", "VD", "V D"),
    "final_norm": Tensor("norm.weight", "D", "D"),
    "unembed": Tensor(HEAD, "DV", "V D"),
}
LAYER = {
    "attention/q/kernel": Tensor("self_attn.q_proj.weight", "DHh", "Hh D"),
    "attention/k/kernel": Tensor("self_attn.k_proj.weight", "DKh", "Kh D"),
    "attention/v/kernel": Tensor("self_attn.v_proj.weight", "DKh", "Kh D"),
    "attention/out/kernel": Tensor("self_attn.o_proj.weight", "HhD", "D Hh"),
    "attention/q/bias": Tensor("self_attn.q_proj.bias", "Hh", "Hh"),
    "attention/k/bias": Tensor("self_attn.k_proj.bias", "Kh", "Kh"),
    "attention/v/bias": Tensor("self_attn.v_proj.bias", "Kh", "Kh"),
    "attention/q_norm/scale": Tensor("self_attn.q_norm.weight", "h", "h"),
    "attention/k_norm/scale": Tensor("self_attn.k_norm.weight", "h", "h"),
    "attention_norm/scale": Tensor("input_layernorm.weight", "D", "D"),
    "mlp_norm/scale": Tensor("post_attention_layernorm.weight", "D", "D"),
    "mlp/gate/kernel": Tensor("mlp.gate_proj.weight", "DF", "F D"),
    "mlp/up/kernel": Tensor("mlp.up_proj.weight", "DF", "F D"),
    "mlp/down/kernel": Tensor("mlp.down_proj.weight", "FD", "D F"),
    "moe/router": Tensor("mlp.gate.weight", "DE", "E D"),
    "moe/gate": Tensor("mlp.experts.{e}.gate_proj.weight", "DF", "F D"),
    "moe/up": Tensor("mlp.experts.{e}.up_proj.weight", "DF", "F D"),
    "moe/down": Tensor("mlp.experts.{e}.down_proj.weight", "FD", "D F"),
}
# With norms after attention and feed-forward too, Gemma's names for the four.
POST_NORMS = {
    "attention_post_norm/scale": Tensor("post_attention_layernorm.weight", "D", "D"),
    "mlp_norm/scale": Tensor("pre_feedforward_layernorm.weight", "D", "D"),
    "mlp_post_norm/scale": Tensor("post_feedforward_layernorm.weight", "D", "D"),
}
# What turns part of a head is a GLM: "glm", or "glm4" with norms after attention and feed-forward too.
GLM = {
    "mlp/gate/kernel": Tensor("mlp.gate_up_proj.weight", "DF", "F D", rows=(0, 2)),
    "mlp/up/kernel": Tensor("mlp.gate_up_proj.weight", "DF", "F D", rows=(1, 2)),
}
GLM_TURNED = ("attention/q/", "attention/k/")
GLM_POST_NORMS = {
    "attention_post_norm/scale": Tensor("post_self_attn_layernorm.weight", "D", "D"),
    "mlp_post_norm/scale": Tensor("post_mlp_layernorm.weight", "D", "D"),
}
# A mixture without norms on queries and keys is a Mixtral.
MIXTRAL = {
    "moe/router": Tensor("block_sparse_moe.gate.weight", "DE", "E D"),
    "moe/gate": Tensor("block_sparse_moe.experts.{e}.w1.weight", "DF", "F D"),
    "moe/up": Tensor("block_sparse_moe.experts.{e}.w3.weight", "DF", "F D"),
    "moe/down": Tensor("block_sparse_moe.experts.{e}.w2.weight", "FD", "D F"),
}
# How transformers 5 holds experts in memory, and writes them when it is told not to take them apart: [E, gate above up, D].
FUSED = {
    "moe/router": LAYER["moe/router"],
    "moe/gate": Tensor("mlp.experts.gate_up_proj", "DF", "F D", rows=(0, 2)),
    "moe/up": Tensor("mlp.experts.gate_up_proj", "DF", "F D", rows=(1, 2)),
    "moe/down": Tensor("mlp.experts.down_proj", "FD", "D F"),
}
EXPERTS = ("moe/gate", "moe/up", "moe/down")
# Where the language model is: in a checkpoint of its own, or beside towers, as 4.5x and 5.x name it.
PREFIXES = ("model.language_model.", "language_model.model.", "model.")
HEADS = {"language_model.model.": f"language_model.{HEAD}"}


class Piece(typing.NamedTuple):
    """A tensor or its part of one that holds several; its place in a stacked parameter: (), (layer,) or (layer, expert)."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    part: tuple[int | slice, ...]  # () is all of it
    place: tuple[int, ...]
    tensor: Tensor


Plan = dict[str, list[Piece]]  # the pieces of each parameter, by its path


def of_layer(model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of one layer, by the paths of its parameters."""
    named = LAYER | ({} if model.qk_norm else MIXTRAL)
    if not model.rotary_dim:
        return named | (POST_NORMS if model.post_norms else {})
    turned = {path: x._replace(turned=model.rotary_dim) for path, x in named.items() if path.startswith(GLM_TURNED)}
    return named | turned | GLM | (GLM_POST_NORMS if model.post_norms else {})


def plan(shapes: PyTree, model: ModelConfig, prefix: str, fused: bool = False) -> Plan:
    """Every tensor of a model's parameters, whose shapes are given."""
    named = of_layer(model) | (FUSED if fused else {})
    return {path: list(_pieces(path, leaf.shape, named, prefix, fused)) for path, leaf in by_path(shapes).items()}


def _pieces(
    path: str, shape: tuple[int, ...], named: Mapping[str, Tensor], prefix: str, fused: bool
) -> Iterator[Piece]:
    if path in OUTSIDE:
        tensor = OUTSIDE[path]
        name = HEADS.get(prefix, HEAD) if path == "unembed" else prefix + tensor.name
        yield Piece(name, tensor.shape(shape), (), (), tensor)
        return
    own = path.removeprefix("layers/")
    tensor = named[own]
    of_expert = own in EXPERTS
    of_one = tensor.shape(shape[1 + of_expert :])
    which, count = tensor.rows
    whole = (count * of_one[0], *of_one[1:])
    rows = slice(which * of_one[0], (which + 1) * of_one[0])
    for i in range(shape[0]):
        name = f"{prefix}layers.{i}.{tensor.name}"
        if not of_expert:
            yield Piece(name, whole, (rows,) if count > 1 else (), (i,), tensor)
            continue
        for e in range(shape[1]):
            if fused:
                yield Piece(name, (shape[1], *whole), (e, rows), (i, e), tensor)
            else:
                yield Piece(name.format(e=e), whole, (), (i, e), tensor)


def in_order(plan: Plan) -> list[tuple[str, Piece]]:
    """(path, piece) as a file has them: embeddings, one layer after another, the final norm and the head."""
    ends = {"embed": -1, "final_norm": math.inf, "unembed": math.inf}
    pairs = [(path, piece) for path, pieces in plan.items() for piece in pieces]
    return sorted(pairs, key=lambda pair: pair[1].place[0] if pair[1].place else ends[pair[0]])


def prefix_of(names: Collection[str]) -> str | None:
    """Where the language model of a checkpoint is; None when its embeddings have no name that is known."""
    return next((prefix for prefix in PREFIXES if prefix + OUTSIDE["embed"].name in names), None)


def is_fused(names: Collection[str], prefix: str) -> bool:
    """Whether the experts of a layer lie in one tensor."""
    return f"{prefix}layers.0.{FUSED['moe/gate'].name}" in names
