"""config.json in the words of ``config.model``: both spellings, every family, what is refused, and the way back."""

import json
import re

import pytest

from configs import base
from configs.models import MODELS
from rl_reason import checks
from rl_reason.models.hf_config import WeightsError, config_json, model_keys, read_json
from rl_reason.models.transformer import ModelConfig

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

GLM = dict(  # glm-4-9b-chat-hf's
    architectures=["GlmForCausalLM"],
    model_type="glm",
    attention_bias=True,
    head_dim=128,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=13696,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=40,
    num_key_value_heads=2,
    partial_rotary_factor=0.5,
    rms_norm_eps=1.5625e-07,
    rope_theta=5000000.0,
    tie_word_embeddings=False,
    vocab_size=151552,
)
INTERNLM3 = dict(  # internlm3-8b-instruct's
    architectures=["InternLM3ForCausalLM"],
    model_type="internlm3",
    bias=False,
    head_dim=128,
    hidden_act="silu",
    hidden_size=4096,
    intermediate_size=10240,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=48,
    num_key_value_heads=2,
    qkv_bias=False,
    rms_norm_eps=1e-5,
    rope_scaling=dict(factor=6.0, rope_type="dynamic"),
    rope_theta=50000000,
    tie_word_embeddings=False,
    vocab_size=128512,
)


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    "config, name",
    [
        (QWEN2, "Qwen2.5-7B"),
        (LLAMA, "Llama-3.1-8B"),
        (QWEN3_MOE, "Qwen3-30B-A3B-Base"),
        (GEMMA3, "gemma-3-4b-pt"),
        (GLM, "glm-4-9b-chat-hf"),
        (INTERNLM3, "internlm3-8b-instruct"),
    ],
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
    rope = dict(rope_type="default", rope_theta=5000000.0, partial_rotary_factor=0.5)
    assert model_keys(without(GLM, "rope_theta", "partial_rotary_factor") | dict(rope_parameters=rope)) == model_keys(
        GLM
    )
    rope = dict(rope_type="dynamic", factor=6.0, rope_theta=50000000.0)
    new = without(INTERNLM3, "bias", "qkv_bias", "rope_theta", "rope_scaling")
    new |= dict(architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False, rope_parameters=rope)
    assert model_keys(new) == model_keys(INTERNLM3)
    moe = without(QWEN3_MOE, "num_experts") | dict(num_local_experts=128)
    assert model_keys(moe) == model_keys(QWEN3_MOE)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    assert model_keys(config_json(MODELS[name])) == MODELS[name]


def test_glm():
    # What its config.json may leave unsaid, as transformers' GlmConfig has it; biases as it says; 0414's further norms.
    unsaid = without(GLM, "head_dim", "attention_bias", "partial_rotary_factor", "rope_theta")
    assert model_keys(unsaid) == MODELS["glm-4-9b-chat-hf"] | dict(rope_theta=1e4)
    for bias in (False, True):
        changes = dict(
            model_type="glm4", architectures=["Glm4ForCausalLM"], attention_bias=bias, partial_rotary_factor=0.25
        )
        keys = model_keys(GLM | changes)
        assert keys == MODELS["glm-4-9b-chat-hf"] | dict(post_norms=True, qkv_bias=bias, rotary_dim=32)
        written = config_json(keys)
        assert {key: written[key] for key in changes} == changes and model_keys(written) == keys


def test_internlm3_is_a_llama_or_with_biases_a_qwen2():
    assert config_json(model_keys(INTERNLM3))["architectures"] == ["LlamaForCausalLM"]
    biased = model_keys(INTERNLM3 | dict(qkv_bias=True))
    assert biased == MODELS["internlm3-8b-instruct"] | dict(qkv_bias=True)
    assert config_json(biased)["architectures"] == ["Qwen2ForCausalLM"]


def test_rows_beyond_dynamic_scaling_are_refused():
    config = base.get_config()
    config.model.update(model_keys(INTERNLM3))
    model = ModelConfig.of(config.model.to_dict())
    config.rollout.completion_len = 32768 - config.data.max_prompt_len_tokens
    checks.positions(config, model)
    config.rollout.completion_len += 1
    with pytest.raises(
        ValueError, match=r"together are 32769 tokens, and config\.model\.max_position=32768: shorten them"
    ):
        checks.positions(config, model)


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
        (QWEN2, dict(rope_scaling=YARN), "rope_type='yarn'; there are default, dynamic, linear, llama3"),
        (
            GLM,
            dict(model_type="chatglm", architectures=["ChatGLMModel"]),
            "model_type='chatglm' cannot be read. This is GLM's older format",
        ),
        (GLM, dict(partial_rotary_factor=1.0), "partial_rotary_factor=1.0; of GLM's models RoPE must turn a part"),
        (GLM, dict(partial_rotary_factor=0.001), "partial_rotary_factor=0.001; of GLM's models RoPE must turn a part"),
        (LLAMA, dict(partial_rotary_factor=0.5), "of all others whole heads"),
        (INTERNLM3, dict(bias=True), "bias=True; what can be read has bias=False"),
        (INTERNLM3, dict(architectures=["InternLM3ForSequenceClassification"]), "is none that can be read"),
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
