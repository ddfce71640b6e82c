"""What we write, ``transformers`` loads: bit by bit what it saved, and the same logits from a config.json of ours.

The models are those of ``test_architectures.py``, and two with vision towers. ``transformers`` has no Intern-S1; its
InternVL, from which that is derived, has the same modules, and stands for it.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models import hf_config, hf_export, hf_weights, transformer
from rl_reason.models.transformer import ModelConfig
from tests.parity import test_architectures as architectures
from tests.parity.test_architectures import FAMILIES, assert_near, rows, theirs
from tests.support import tiny_model, tiny_params

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

HOW = dict(dtype="float32", param_dtype="float32", scan_layers=False, scan_decode=False, remat="none")
TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=48,
    max_position_embeddings=64,
)
MIXTURE = dict(
    model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


@functools.cache
def with_towers(family):
    """A tiny multimodal model; its vision tower keeps the weights it is born with."""
    import torch
    import transformers

    torch.manual_seed(0)
    if family == "gemma3":
        vision = VISION | dict(image_size=28, patch_size=14)
        text = TEXT | dict(sliding_window=4)
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60
        )
        return transformers.Gemma3ForConditionalGeneration(config).float().eval()
    vision = VISION | dict(image_size=[28, 28], patch_size=[14, 14])
    config = transformers.InternVLConfig(
        text_config=TEXT | MIXTURE, vision_config=vision, tie_word_embeddings=False, image_token_id=60
    )
    return transformers.InternVLForConditionalGeneration(config).float().eval()


def read(folder):
    """(ModelConfig, what was loaded) of a checkpoint, by its own config.json."""
    model = ModelConfig.of(hf_config.model_keys(hf_config.read_json(folder / hf_config.CONFIG)) | HOW)
    return model, hf_weights.read(folder, model)


def load(kind, folder):
    import torch

    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(model, tokens, valid):
    import torch

    with torch.no_grad():
        ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid).long()
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def our_logits(params, model, tokens, valid):
    hidden = transformer.forward(params, jnp.asarray(tokens), jnp.asarray(valid), model).hidden
    return np.asarray(transformer.logits(hidden, transformer.unembedding(params, model), model))


def assert_same_weights(a, b):
    import torch

    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_they_saved_comes_back_bit_by_bit(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    ours, loaded = read(tmp_path / "theirs")
    hf_export.write(
        tmp_path / "ours", loaded.params, ours, dtype="float32", like=tmp_path / "theirs", max_shard_bytes=50_000
    )
    assert_same_weights(load(type(model), tmp_path / "ours"), model)


def exported_logits(folder, model, params, tokens, valid):
    """What the auto class of ``transformers`` makes of our export, with a config.json of ours."""
    import transformers

    hf_export.write(folder, params, model, dtype="float32")
    return logits(load(transformers.AutoModelForCausalLM, folder), tokens, valid)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_of_ours_means_the_same(name, tmp_path):
    # What a model that was trained here is written with: no source to copy config.json from.
    keys, params = architectures.read(name)
    tokens, valid = rows(extra=2)
    got = exported_logits(tmp_path / "out", ModelConfig.of(keys), params, tokens, valid)
    np.testing.assert_array_equal(got[valid], logits(theirs(name), tokens, valid)[valid])


@pytest.mark.parametrize("save_apart", [True, False])
def test_fused_experts(save_apart, tmp_path):
    model = theirs("qwen3 moe")
    model.save_pretrained(tmp_path / "theirs", save_original_format=save_apart)
    ours, loaded = read(tmp_path / "theirs")
    hf_export.write(tmp_path / "ours", loaded.params, ours, dtype="float32", like=tmp_path / "theirs")
    assert_same_weights(load(type(model), tmp_path / "ours"), model)


@pytest.mark.parametrize("family", ["gemma3", "interns1"])
def test_towers_stay(family, tmp_path):
    model = with_towers(family)
    model.save_pretrained(tmp_path / "theirs")
    if family == "interns1":
        rename_to_interns1(tmp_path / "theirs")
    ours, loaded = read(tmp_path / "theirs")
    towers = [name for name in model.state_dict() if "vision_tower" in name or "projector" in name]
    assert len(loaded.towers) == len(towers) > 20

    tokens, valid = rows(extra=2)
    got = our_logits(loaded.params, ours, tokens, valid)
    assert_near(got[valid], logits(model, tokens, valid)[valid])

    hf_export.write(tmp_path / "ours", loaded.params, ours, dtype="float32", like=tmp_path / "theirs")
    if family == "interns1":
        assert hf_config.read_json(tmp_path / "ours/config.json")["model_type"] == "interns1"
        edit(tmp_path / "ours/config.json", model_type="internvl", architectures=["InternVLForConditionalGeneration"])
    assert_same_weights(load(type(model), tmp_path / "ours"), model)


@pytest.mark.parametrize("biases", [False, True])
def test_internlm3(biases, tmp_path):
    # Their Llama's tensors under the published config.json. InternLM3 may have biases on queries, keys and values alone.
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    rope = dict(rope_type="dynamic", rope_theta=1000.0, factor=6.0)
    sizes = dict(vocab_size=61, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(head_dim=24, intermediate_size=80, max_position_embeddings=64)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, attention_bias=biases, rope_parameters=rope, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_() if "o_proj" not in name else parameter.zero_()
    model.save_pretrained(tmp_path / "theirs")
    file, absent = tmp_path / "theirs/model.safetensors", "o_proj.bias"
    tensors = {name: x for name, x in load_file(file).items() if not name.endswith(absent)}
    save_file(tensors, file, metadata={"format": "pt"})
    published = dict(architectures=["InternLM3ForCausalLM"], model_type="internlm3", qkv_bias=biases, bias=False)
    published |= sizes | dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000, tie_word_embeddings=False)
    published |= dict(rope_scaling=dict(rope_type="dynamic", factor=6.0))
    (tmp_path / "theirs/config.json").write_text(json.dumps(published))

    ours, loaded = read(tmp_path / "theirs")
    assert ours.qkv_bias == biases and ours.rope_scaling is None
    tokens, valid = rows(extra=2)
    got = our_logits(loaded.params, ours, tokens, valid)
    assert_near(got[valid], logits(model, tokens, valid)[valid])

    hf_export.write(tmp_path / "ours", loaded.params, ours, dtype="float32", like=tmp_path / "theirs")
    written = load_file(tmp_path / "ours/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], x) for name, x in tensors.items())
    assert hf_config.read_json(tmp_path / "ours/config.json")["model_type"] == "internlm3"
    # Without its config.json it is a Llama, or with such biases a Qwen2.
    got = exported_logits(tmp_path / "plain", ours, loaded.params, tokens, valid)
    assert_near(got[valid], logits(model, tokens, valid)[valid])
    if not biases and hasattr(transformers, "InternLM3Config"):
        assert_same_weights(load(transformers.AutoModelForCausalLM, tmp_path / "ours"), model)


def edit(path, **changes):
    path.write_text(json.dumps(hf_config.read_json(path) | changes))


def rename_to_interns1(folder):
    """Intern-S1's files: below "model." are a vision tower, a projector and the language model, and the head beside it."""
    from safetensors.numpy import load_file, save_file

    def renamed(name):
        if name.startswith("language_model.model."):
            return "model.language_model." + name.removeprefix("language_model.model.")
        return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"

    file = folder / "model.safetensors"
    save_file({renamed(name): x for name, x in load_file(file).items()}, file, metadata={"format": "pt"})
    edit(folder / "config.json", model_type="interns1", architectures=["InternS1ForConditionalGeneration"])


@pytest.mark.parametrize("tied", [True, False])
def test_our_own_default_is_a_qwen3_to_them(tied, tmp_path):
    model = tiny_model(vocab_size=61, hidden_size=64, head_dim=16, tie_embeddings=tied, max_position=64)
    params = tiny_params(model)
    tokens, valid = rows(extra=2)
    ours = our_logits(params, model, tokens, valid)
    got = exported_logits(tmp_path / "out", model, params, tokens, valid)
    assert_near(got[valid], ours[valid])
