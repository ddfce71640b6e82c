"""config.json in the words of ``config.model``: both spellings, every family, what is refused, and the way back."""

import json
import re

import pytest

from configs.models import MODELS
from rl_reason.models.hf_config import WeightsError, config_json, model_keys, read_json

QWEN2 = dict(  # as transformers 4.5x writes it; the numbers are Qwen2.5-7B's
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    hidden_act="silu",
    hidden_size=3584,
    intermediate_size=18944,
    max_position_embeddings=131072,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=152064,
)
LLAMA_SCALING = dict(
    factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type="llama3"
)
LLAMA = dict(  # Llama-3.1-8B's
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    attention_bias=False,
    mlp_bias=False,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling=LLAMA_SCALING,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    vocab_size=128256,
)
QWEN3_MOE = dict(  # Qwen3-30B-A3B-Base's
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    attention_bias=False,
    decoder_sparse_step=1,
    head_dim=128,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=32768,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=151936,
)
GEMMA3 = dict(  # gemma-3-4b-pt's, which leaves the rest to transformers' defaults
    architectures=["Gemma3ForConditionalGeneration"],
    model_type="gemma3",
    text_config=dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    ),
    vision_config=dict(hidden_size=1152, model_type="siglip_vision_model"),
)


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    "config, name",
    [(QWEN2, "Qwen2.5-7B"), (LLAMA, "Llama-3.1-8B"), (QWEN3_MOE, "Qwen3-30B-A3B-Base"), (GEMMA3, "gemma-3-4b-pt")],
)
def test_published_files_are_the_presets(config, name):
    assert model_keys(config) == MODELS[name]


def test_towers_are_looked_past():
    text = QWEN3_MOE | dict(vocab_size=153216)
    outer = dict(architectures=["InternS1ForConditionalGeneration"], model_type="interns1", text_config=text)
    assert model_keys(outer) == model_keys(text)
    assert model_keys(outer | dict(tie_word_embeddings=True)) == model_keys(text) | dict(tie_embeddings=True)


def test_the_spelling_of_transformers_5():
    rope = dict(LLAMA_SCALING, rope_theta=500000.0)
    assert model_keys(without(LLAMA, "rope_theta", "rope_scaling") | dict(rope_parameters=rope)) == model_keys(LLAMA)
    text = GEMMA3["text_config"]
    assert isinstance(text, dict)
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(34)]
    ropes = dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    new = without(text, "rope_scaling") | dict(layer_types=kinds, rope_parameters=ropes)
    assert model_keys(GEMMA3 | dict(text_config=new)) == model_keys(GEMMA3)
    moe = without(QWEN3_MOE, "num_experts") | dict(num_local_experts=128)
    assert model_keys(moe) == model_keys(QWEN3_MOE)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    assert model_keys(config_json(MODELS[name])) == MODELS[name]


def test_windows():
    sliding = dict(use_sliding_window=True, sliding_window=512)
    window = lambda **changes: tuple(model_keys(QWEN2 | sliding | changes)[key] for key in ("window", "full_every"))
    assert window(max_window_layers=28) == (0, 0)  # so many layers have none
    assert window(max_window_layers=0) == (512, 0)
    assert window(use_sliding_window=False) == (0, 0)
    alternating = ["sliding_attention", "full_attention"] * 14
    assert window(layer_types=alternating) == (512, 2)
    with pytest.raises(
        WeightsError, match=r"max_window_layers=9 with sliding_window=512: layers without a window must"
    ):
        window(max_window_layers=9)
    with pytest.raises(WeightsError, match=r"layer_types=\['full_attention'\]; want full_attention or"):
        window(layer_types=["full_attention"])
    with pytest.raises(WeightsError, match="layer_types="):
        window(layer_types=alternating[::-1])


YARN = dict(rope_type="yarn", factor=4.0)


@pytest.mark.parametrize(
    "config, changes, says",
    [
        (
            QWEN2,
            dict(model_type="rwkv"),
            "model_type='rwkv' with architectures=['Qwen2ForCausalLM'] is none that can be",
        ),
        (QWEN2, dict(architectures=["Qwen2ForSequenceClassification"]), "there are Gemma2ForCausalLM, "),
        (QWEN2, dict(hidden_act="gelu"), "hidden_act='gelu'; of qwen2 silu can be read"),
        (QWEN2, dict(rope_scaling=YARN), "rope_type='yarn'; there are default, linear, llama3"),
        (QWEN2, dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type='dynamic'"),
        (QWEN2, dict(quantization_config=dict(quant_method="gptq")), "quantization_config={'quant_method': 'gptq'}"),
        (LLAMA, dict(attention_bias=True), "attention_bias=True; what can be read has attention_bias=False"),
        (LLAMA, dict(mlp_bias=True), "mlp_bias=True"),
        (LLAMA, dict(rope_parameters=dict(rope_type="llama3", rope_theta=1.0)), "rope_parameters lacks 'factor'"),
        (
            LLAMA,
            dict(partial_rotary_factor=0.5, rope_scaling=dict(partial_rotary_factor=0.5)),
            "partial_rotary_factor",
        ),
        (QWEN3_MOE, dict(norm_topk_prob=False), "norm_topk_prob=False"),
        (QWEN3_MOE, dict(norm_topk_prob=None), "norm_topk_prob=False"),  # what transformers then assumes
        (QWEN3_MOE, dict(mlp_only_layers=[0]), "mlp_only_layers=[0]"),
        (QWEN3_MOE, dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
        (QWEN3_MOE, dict(num_experts=None), "lacks 'num_experts'"),
        (QWEN3_MOE, dict(hidden_size=None), "lacks 'hidden_size'"),
        (GEMMA3, dict(text_config=dict(model_type="llava")), "text_config.model_type='llava'; there are llama, "),
        (GEMMA3, dict(text_config=None), "text_config.model_type=None"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) and len(x) < 3 else "",
)
def test_refused_by_key(config, changes, says):
    with pytest.raises(WeightsError, match=re.escape(says)) as error:
        model_keys(config | changes, "there/config.json")
    assert str(error.value).startswith("there/config.json")


def test_scaled_windows_of_their_own_are_refused():
    scaled = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    text = GEMMA3["text_config"] | dict(
        rope_parameters=dict(full_attention=scaled | dict(factor=8.0), sliding_attention=scaled)
    )
    with pytest.raises(WeightsError, match=r"RoPE is scaled by .* in layers with a sliding window"):
        model_keys(GEMMA3 | dict(text_config=text))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(scale_embeddings=True), "scale_embeddings=True (Qwen2ForCausalLM: False)"),
        (dict(final_soft_cap=30.0), "final_soft_cap=30.0 (Qwen2ForCausalLM: 0.0)"),
        (dict(qk_norm=True), "qkv_bias=True (Qwen3ForCausalLM: False)"),
        (
            dict(post_norms=True, norm_plus_one=True, activation="silu"),
            "activation='silu' (Gemma2ForCausalLM: 'gelu_tanh')",
        ),
    ],
)
def test_models_that_transformers_has_not(changes, says):
    with pytest.raises(WeightsError, match=re.escape(says)):
        config_json(MODELS["Qwen2.5-7B"] | changes)


def test_files_that_are_none(tmp_path):
    with pytest.raises(
        WeightsError, match=r"config\.json: no such file\. Give the folder of a Hugging Face checkpoint"
    ):
        read_json(tmp_path / "config.json")
    for text in ("{", json.dumps([1])):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            WeightsError, match=r"config\.json (cannot be read|holds no JSON object).*; fetch it again"
        ):
            read_json(tmp_path / "config.json")
