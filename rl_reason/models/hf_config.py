"""A Hugging Face config.json in the words of ``config.model``, and back. No jax: configs are resolved before it is set up.

Read as transformers 4.5x writes it (rope_theta, rope_scaling, sliding_window_pattern) and as 5.x does (rope_parameters,
layer_types); written as 4.5x does, which both read. What our transformer cannot do is refused by its key.
"""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence

Values = dict[str, typing.Any]
CONFIG = "config.json"


class WeightsError(ValueError):
    """A checkpoint that cannot be read or written as asked: which file, which name, what to do."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type means: its language model's class, the keys of ours that it fixes, and what its config.json may
    leave unsaid because transformers assumes it. ``also``: another class that it may name."""

    architecture: str
    fixed: Values = dataclasses.field(default_factory=dict)
    assumed: Values = dataclasses.field(default_factory=dict)
    also: str = ""


_PLAIN: Values = dict(
    activation="silu", qkv_bias=False, qk_norm=False, post_norms=False, norm_plus_one=False, scale_embeddings=False
)
_GLM_ASSUMED: Values = dict(head_dim=128, attention_bias=True, rope_theta=1e4, partial_rotary_factor=0.5)
_GEMMA: Values = dict(activation="gelu_tanh", post_norms=True, norm_plus_one=True, scale_embeddings=True)
_GEMMA_ASSUMED: Values = dict(
    head_dim=256, query_pre_attn_scalar=256, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh"
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", assumed=dict(rope_theta=1e4)),
    "mixtral": Family("MixtralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", dict(qkv_bias=True)),
    "qwen3": Family("Qwen3ForCausalLM", dict(qk_norm=True), dict(head_dim=128)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", dict(qk_norm=True), dict(norm_topk_prob=False)),
    "glm": Family("GlmForCausalLM", assumed=_GLM_ASSUMED),
    "glm4": Family("Glm4ForCausalLM", dict(post_norms=True), _GLM_ASSUMED),
    # A Llama, by the checkpoint's own code and, since 5.x, by transformers' Llama.
    "internlm3": Family("InternLM3ForCausalLM", assumed=dict(head_dim=128), also="LlamaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA, _GEMMA_ASSUMED),
    # Gemma 3's multimodal checkpoints say of their text_config little more than what differs from the 4B model.
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | dict(qk_norm=True),
        _GEMMA_ASSUMED
        | dict(
            vocab_size=262208,
            num_attention_heads=8,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            sliding_window=4096,
            max_position_embeddings=131072,
        ),
    ),
}
# Models whose config.json holds a language model's as text_config, beside towers that are left as they are.
WRAPPERS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "interns1": "InternS1ForConditionalGeneration",
}
MIXTURES = ("mixtral", "qwen3_moe")
GLM = ("glm", "glm4")
BIASED = (*GLM, "internlm3")  # may have biases on queries, keys and values, and say so
INSTEAD = {
    "chatglm": "This is GLM's older format, of code that comes with the checkpoint; fetch the same weights in that of "
    "transformers: for glm-4-9b-chat, glm-4-9b-chat-hf."
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Keys that change the function, with the one value that is ours.
EXPECTED: Values = dict(
    attention_bias=False,
    bias=False,
    mlp_bias=False,
    norm_topk_prob=True,
    mlp_only_layers=[],
    decoder_sparse_step=1,
    use_bidirectional_attention=False,
    quantization_config=None,
)


def read_json(path: pathlib.Path) -> Values:
    """A JSON object of a checkpoint.

    Raises:
        WeightsError: no such file, or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: no such file. Give the folder of a Hugging Face checkpoint, with {CONFIG} and safetensors; what an "
            "interrupted export left has no such file: delete it and export again."
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); fetch it again.") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object; fetch it again.")
    return values


def first_of(names: Sequence[str]) -> str:
    """The first name and how many more there are.

    >>> first_of(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def model_keys(config: Mapping[str, typing.Any], where: str = CONFIG) -> Values:
    """The keys of ``config.model`` that a config.json settles: all but dtypes, scans and remat.

    Raises:
        WeightsError: an architecture or a value that our transformer has not; ``where`` names the file.
    """
    text = _text(config, where)
    family = FAMILIES[text["model_type"]]
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    experts = (text.get("num_local_experts") or text["num_experts"]) if text["model_type"] in MIXTURES else 0
    scalar = text.get("query_pre_attn_scalar")
    window, full_every = _window(text, where)
    biases = text["model_type"] in BIASED and text.get("qkv_bias", text.get("attention_bias", False))
    return (
        _PLAIN
        | dict(qkv_bias=bool(biases))
        | family.fixed
        | dict(
            vocab_size=text["vocab_size"],
            num_layers=layers,
            hidden_size=text["hidden_size"],
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            mlp_size=text["moe_intermediate_size"] if text["model_type"] == "qwen3_moe" else text["intermediate_size"],
            norm_eps=float(text["rms_norm_eps"]),
            tie_embeddings=bool(text["tie_word_embeddings"]),
            num_experts=experts,
            experts_per_token=text["num_experts_per_tok"] if experts else 0,
            query_scale=0.0 if scalar in (None, head_dim) else float(scalar) ** -0.5,
            attention_soft_cap=float(text.get("attn_logit_softcapping") or 0),
            final_soft_cap=float(text.get("final_logit_softcapping") or 0),
            window=window,
            full_every=full_every,
            max_position=text["max_position_embeddings"],
            **_rope(text, head_dim, bool(window), where),
        )
    )


class _Text(dict):
    """A text config whose missing keys are named with their file."""

    def __init__(self, values: Mapping[str, typing.Any], where: str):
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> typing.NoReturn:
        raise WeightsError(f"{self.where} lacks {key!r}; fetch the file again, or add the key.")


def _text(config: Mapping[str, typing.Any], where: str) -> _Text:
    """The language model's part, with what its family assumes; all that is refused whatever the sizes."""
    kind = config.get("model_type")
    known = {**WRAPPERS, **{name: family.architecture for name, family in FAMILIES.items()}}
    given = (config.get("architectures") or [known.get(str(kind))])[0]
    if kind in INSTEAD:
        raise WeightsError(f"{where}: model_type={kind!r} cannot be read. {INSTEAD[kind]}")
    also = FAMILIES[kind].also if kind in FAMILIES else ""
    if kind not in known or given not in (known[kind], also):
        raise WeightsError(
            f"{where}: model_type={kind!r} with architectures={config.get('architectures')!r} is none that can be read; "
            f"there are {', '.join(sorted(known.values()))}."
        )
    text = config if kind in FAMILIES else config.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in FAMILIES:
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        raise WeightsError(f"{where}: text_config.model_type={inner!r}; there are {', '.join(FAMILIES)}.")
    family = FAMILIES[text["model_type"]]
    spoken = {key: value for key, value in text.items() if value is not None}
    outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    text = _Text(dict(tie_word_embeddings=False) | family.assumed | spoken | outer, where)
    for key, value in EXPECTED.items():
        if key == "attention_bias" and text["model_type"] in BIASED:
            continue
        if text.get(key, value) not in (value, None):
            raise WeightsError(f"{where}: {key}={text[key]!r}; what can be read has {key}={value!r}.")
    act = text.get("hidden_activation") or text.get("hidden_act", "silu")
    want = (_PLAIN | family.fixed)["activation"]
    if ACTIVATIONS.get(act) != want:
        raise WeightsError(f"{where}: hidden_act={act!r}; of {text['model_type']} {want} can be read.")
    return text


def _window(text: _Text, where: str) -> tuple[int, int]:
    """(window, full_every): the tokens that layers with a window see, and which layers have none."""
    kind, layers = text["model_type"], text["num_hidden_layers"]
    width = text.get("sliding_window") or 0
    if kind.startswith("qwen") and not text.get("use_sliding_window", False):
        width = 0
    pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6
    if listed := text.get("layer_types"):
        if len(listed) != layers or set(listed) - {"full_attention", "sliding_attention"}:
            raise WeightsError(
                f"{where}: layer_types={listed!r}; want full_attention or sliding_attention for each of {layers} layers."
            )
        full = [name == "full_attention" for name in listed]
    elif kind == "gemma2":
        full = [(i + 1) % 2 == 0 for i in range(layers)]
    elif kind == "gemma3_text":
        full = [(i + 1) % pattern == 0 for i in range(layers)]
    elif kind in ("qwen2", "qwen3"):
        full = [i < text.get("max_window_layers", layers) for i in range(layers)]
    else:
        full = [kind in ("llama", *BIASED)] * layers
    if not width or all(full):
        return 0, 0
    full_every = full.index(True) + 1 if any(full) else 0
    if full != [full_every > 0 and (i + 1) % full_every == 0 for i in range(layers)]:
        key = "layer_types" if listed else "max_window_layers"
        raise WeightsError(
            f"{where}: {key}={text.get(key)!r} with sliding_window={width}: layers without a window must come every so "
            "many, as (i + 1) % n == 0."
        )
    return width, full_every


def _rope(text: _Text, head_dim: int, windowed: bool, where: str) -> Values:
    """RoPE's thetas, how much of a head turns, and the scaling of layers without a window, from either spelling."""
    given = text.get("rope_parameters")
    if given is None:
        full = {"rope_theta": text["rope_theta"]} | dict(text.get("rope_scaling") or {})
        local = {"rope_theta": text["rope_local_base_freq"]} if "rope_local_base_freq" in text else full
    else:
        full = given.get("full_attention", given)
        local = given.get("sliding_attention", full)
    full, local = _Text(full, f"{where}: rope_parameters"), _Text(local, f"{where}: rope_parameters")
    turned = [rope.get("partial_rotary_factor") or text.get("partial_rotary_factor", 1.0) for rope in (full, local)]
    partial, rotary_dim = text["model_type"] in GLM, int(head_dim * turned[0])
    if turned[0] != turned[1] or not (0 < rotary_dim < head_dim if partial else rotary_dim == head_dim):
        raise WeightsError(
            f"{where}: partial_rotary_factor={turned[0]}; of GLM's models RoPE must turn a part of each head, of all others "
            "whole heads."
        )
    scaling, scaling_local = _scaling(full, where), _scaling(local, where)
    theta, theta_local = float(full["rope_theta"]), float(local["rope_theta"])
    apart = windowed and (theta, scaling) != (theta_local, scaling_local)
    if apart and scaling_local is not None:
        raise WeightsError(
            f"{where}: RoPE is scaled by {scaling_local} in layers with a sliding window and by {scaling} in the others; "
            "only the others can have one of their own."
        )
    return dict(
        rope_theta=theta,
        rope_theta_local=theta_local if apart else 0.0,
        rope_scaling=scaling,
        rotary_dim=rotary_dim if partial else 0,
    )


def _scaling(rope: _Text, where: str) -> Values | None:
    """``config.model.rope_scaling``; of "dynamic" none: it rescales rows beyond max_position_embeddings alone, and a config
    with such rows is refused (``checks.positions``)."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return dict(kind=kind, factor=float(rope["factor"]))
    if kind == "llama3":
        scales = {key: float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return dict(kind=kind, **scales, original_max_position=rope["original_max_position_embeddings"])
    raise WeightsError(f"{where}: rope_type={kind!r}; there are default, dynamic, linear, llama3.")


def config_json(keys: Mapping[str, typing.Any], **extra: typing.Any) -> Values:
    """The config.json of a model with these keys (``ModelConfig``'s), and ``extra`` ones such as token ids.

    Raises:
        WeightsError: no family computes the same; names the keys that it would have otherwise.
    """
    if keys["full_every"] > keys["num_layers"]:  # which no layer comes to
        keys = {**keys, "full_every": 0}
    kind = _kind_of(keys)
    family = FAMILIES[kind]
    config: Values = dict(
        architectures=[family.architecture],
        model_type=kind,
        vocab_size=keys["vocab_size"],
        num_hidden_layers=keys["num_layers"],
        hidden_size=keys["hidden_size"],
        num_attention_heads=keys["num_heads"],
        num_key_value_heads=keys["num_kv_heads"],
        head_dim=keys["head_dim"],
        intermediate_size=keys["mlp_size"],
        rms_norm_eps=keys["norm_eps"],
        tie_word_embeddings=keys["tie_embeddings"],
        max_position_embeddings=keys["max_position"],
        **_rope_json(keys),
        **_window_json(kind, keys),
    )
    if kind.startswith("gemma"):
        scalar = keys["query_scale"] ** -2 if keys["query_scale"] else keys["head_dim"]
        config |= dict(
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
            attn_logit_softcapping=keys["attention_soft_cap"] or None,
            final_logit_softcapping=keys["final_soft_cap"] or None,
        )
    else:
        config |= dict(hidden_act="silu")
    if kind not in ("qwen2", "mixtral"):  # which have no such key: the one has biases, the other none
        config |= dict(attention_bias=kind in BIASED and keys["qkv_bias"])
    if kind == "qwen3_moe":
        config |= dict(moe_intermediate_size=keys["mlp_size"], num_experts=keys["num_experts"])
        config |= dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    if kind == "mixtral":
        config |= dict(num_local_experts=keys["num_experts"])
    if keys["num_experts"]:
        config |= dict(num_experts_per_tok=keys["experts_per_token"])
    if kind in GLM:  # whose default is beyond smaller vocabularies
        config |= dict(pad_token_id=None)
    config |= extra
    differing = {key: value for key, value in model_keys(config).items() if not _same(keys[key], value)}
    if differing:
        named = ", ".join(
            f"{key}={keys[key]!r} ({family.architecture}: {value!r})" for key, value in differing.items()
        )
        raise WeightsError(f"No architecture of transformers that can be written is this model: {named}.")
    return config


def _same(ours: typing.Any, theirs: typing.Any) -> bool:
    """query_scale goes through a square and back, which may cost its last bit."""
    both = isinstance(ours, float) and isinstance(theirs, float)
    return abs(ours - theirs) <= 1e-12 * abs(ours) if both else ours == theirs


def _kind_of(keys: Mapping[str, typing.Any]) -> str:
    """The family that is nearest; whether it is this very model is for the caller to check."""
    if keys["rotary_dim"]:
        return "glm4" if keys["post_norms"] else "glm"
    if keys["post_norms"]:
        return "gemma3_text" if keys["qk_norm"] else "gemma2"
    if keys["num_experts"]:
        return "qwen3_moe" if keys["qk_norm"] else "mixtral"
    return "qwen3" if keys["qk_norm"] else "qwen2" if keys["qkv_bias"] else "llama"


def _rope_json(keys: Mapping[str, typing.Any]) -> Values:
    out: Values = dict(rope_theta=keys["rope_theta"], rope_scaling=None)
    if keys["rotary_dim"]:
        out |= dict(partial_rotary_factor=keys["rotary_dim"] / keys["head_dim"])
    elif keys["post_norms"] and keys["qk_norm"]:
        out |= dict(rope_local_base_freq=keys["rope_theta_local"] or keys["rope_theta"])
    if scaling := keys["rope_scaling"]:
        scaling = dict(scaling)
        out["rope_scaling"] = dict(rope_type=scaling.pop("kind")) | {
            {"original_max_position": "original_max_position_embeddings"}.get(key, key): value
            for key, value in scaling.items()
        }
    return out


def _window_json(kind: str, keys: Mapping[str, typing.Any]) -> Values:
    width, every, layers = keys["window"], keys["full_every"], keys["num_layers"]
    full: Sequence[bool] = [not width or (every > 0 and (i + 1) % every == 0) for i in range(layers)]
    out: Values = dict(sliding_window=width or None)
    if kind.startswith("qwen"):
        out |= dict(use_sliding_window=bool(width), max_window_layers=0 if width else layers)
    if kind.startswith("gemma") or kind in ("qwen2", "qwen3"):
        out |= dict(layer_types=["full_attention" if is_full else "sliding_attention" for is_full in full])
    if kind == "gemma3_text":
        out |= dict(sliding_window_pattern=every or layers + 1)
    return out
