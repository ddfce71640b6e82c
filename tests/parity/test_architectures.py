"""Every architecture computes what ``transformers`` computes from the same checkpoint: logits, scores, greedy tokens.

Everything in fp32 on a CPU. Their weights are random, drawn here so that attention and routing are far from uniform, and
come to us through the files that ``save_pretrained`` writes. Rows are longer than the windows of those that have some.
"""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models import hf_config, hf_weights, transformer
from rl_reason.models import score as score_lib
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig, generate
from rl_reason.sampling import make_sampling
from rl_reason.types import Prompts

# torch and transformers warn of their own deprecations while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 61, 64, 4, 4, 2, 24, 80  # head_dim is not HIDDEN / HEADS
EXPERTS, PER_TOKEN, WINDOW = 6, 2, 4
LENGTHS, COMPLETION_LEN = (7, 3, 1, 6, 5), 9
TOLERANCE = 1e-4  # of the largest value compared
MOE = dict(num_experts_per_tok=PER_TOKEN)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
HALF = dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)
SOFT = dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0)
# Their configuration's name, and what differs from the shapes above.
FAMILIES = {
    "qwen2": ("Qwen2", dict()),
    "qwen2 windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0)),
    "qwen3": ("Qwen3", dict(head_dim=HEAD_DIM)),
    "qwen3 tied": ("Qwen3", dict(head_dim=HEAD_DIM, tie_word_embeddings=True)),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(head_dim=HEAD_DIM, num_experts=EXPERTS, moe_intermediate_size=MLP, norm_topk_prob=True, **MOE),
    ),
    "llama3": ("Llama", dict(head_dim=HEAD_DIM, rope_parameters=LLAMA3)),
    "mixtral": ("Mixtral", dict(head_dim=HEAD_DIM, num_local_experts=EXPERTS, sliding_window=None, **MOE)),
    "glm": ("Glm", dict(head_dim=HEAD_DIM, rope_parameters=HALF)),
    "glm4": ("Glm4", dict(head_dim=HEAD_DIM, rope_parameters=HALF | dict(partial_rotary_factor=0.25))),
    "glm4 without biases": ("Glm4", dict(head_dim=HEAD_DIM, attention_bias=False, rope_parameters=HALF)),
    # InternLM3: rows are within max_position_embeddings, where this is no scaling.
    "dynamic": (
        "Llama",
        dict(head_dim=HEAD_DIM, rope_parameters=dict(rope_type="dynamic", rope_theta=1e3, factor=6.0)),
    ),
    "gemma2": (
        "Gemma2",
        dict(head_dim=HEAD_DIM, sliding_window=WINDOW, query_pre_attn_scalar=11, tie_word_embeddings=True, **SOFT),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            head_dim=HEAD_DIM,
            sliding_window=WINDOW,
            query_pre_attn_scalar=HEAD_DIM,
            tie_word_embeddings=True,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
                sliding_attention=dict(rope_type="default", rope_theta=50.0),
            ),
        ),
    ),
}
MIXED = ("gemma2", "gemma3")  # in which layers with a window and without take turns
BOTH = [(name, scan) for name in FAMILIES for scan in (False, True) if not scan or name in ("qwen3 moe", *MIXED)]
WAYS = [pytest.param(name, scan, id=f"{name}{' scanned' * scan}") for name, scan in BOTH]


@functools.cache
def theirs(name):
    """A tiny model of ``transformers``, in fp32, with weights of unit gain."""
    import torch
    import transformers

    family, changes = FAMILIES[name]
    shapes = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=MLP,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = getattr(transformers, f"{family}Config")(**shapes | changes)
    config._attn_implementation = "eager"  # which alone knows soft caps
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(("gemma" not in name) + 0.2 * noise)
            elif "bias" in parameter_name:
                parameter.copy_(0.2 * noise)
            elif "embed" in parameter_name or "lm_head" in parameter_name:
                parameter.copy_(noise * (HIDDEN**-0.5 if "gemma" in name else 0.5))
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.float().eval()


@functools.cache
def read(name):
    """(keys, parameters): their checkpoint, as it lies on disk, in our words and our tree."""
    how = dict(dtype="float32", param_dtype="float32", scan_layers=False, scan_decode=False, remat="none")
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        keys = hf_config.model_keys(hf_config.read_json(pathlib.Path(folder) / hf_config.CONFIG)) | how
        return keys, hf_weights.read(folder, ModelConfig.of(keys)).params


def config_of(name, scan=False) -> ModelConfig:
    return ModelConfig.of(read(name)[0] | dict(scan_layers=scan, scan_decode=scan))


def ours(name):
    return read(name)[1]


def rows(lengths=LENGTHS, extra=0, seed=0):
    """(tokens [N T], valid [N T]): random rows, right-padded with 0 to the longest plus ``extra``."""
    width = max(lengths) + extra
    valid = np.arange(width) < np.array(lengths)[:, None]
    return np.where(valid, np.random.default_rng(seed).integers(1, VOCAB, valid.shape), 0).astype(np.int32), valid


def their_logits(kind, tokens, valid):
    import torch

    with torch.no_grad():
        ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid).long()
        return theirs(kind)(input_ids=ids, attention_mask=mask).logits.numpy()


def assert_near(got, want):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize(("kind", "scan"), WAYS)
def test_logits(kind, scan):
    model = config_of(kind, scan)
    tokens, valid = rows(extra=2)

    @jax.jit
    def run(params, tokens, valid):
        hidden = transformer.forward(params, tokens, valid, model).hidden
        return transformer.logits(hidden, transformer.unembedding(params, model), model)

    want = their_logits(kind, tokens, valid)
    assert want[valid].std() > 0.5  # not a flat distribution, which anything would match
    assert_near(np.asarray(run(ours(kind), tokens, valid))[valid], want[valid])


@pytest.mark.parametrize("kind", ["qwen3", "qwen3 moe", "gemma2"])
def test_scores_of_completions(kind):
    # Rows of 2 prompt tokens and up to 6 of completion; column t is scored by the output of column t - 1.
    import torch

    lengths, prompt_len, temperature = (8, 5, 3, 8), 2, 0.7
    tokens, valid = rows(lengths, seed=1)
    mask = valid & (np.arange(tokens.shape[1]) >= prompt_len)
    run = jax.jit(score_lib.score, static_argnums=(5, 6))
    starts = jnp.full(len(lengths), prompt_len, jnp.int32)
    got = run(ours(kind), tokens, starts, mask, jnp.float32(temperature), config_of(kind), 6)

    logits = torch.from_numpy(their_logits(kind, tokens, valid)[:, :-1])
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).numpy()
    chosen = np.take_along_axis(logprobs.numpy(), tokens[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    assert_near(np.asarray(got.logprobs)[mask], chosen[mask[:, 1:]])
    assert_near(np.asarray(got.entropy)[mask], entropy[mask[:, 1:]])


@functools.cache
def their_greedy(kind):
    """Their greedy continuations of ``rows()``, one prompt at a time and so without padding, never stopped early."""
    import torch

    tokens, _ = rows()
    out = []
    for row, length in zip(tokens, LENGTHS, strict=True):
        ids = torch.from_numpy(row[None, :length]).long()
        knobs = dict(do_sample=False, max_new_tokens=COMPLETION_LEN, pad_token_id=0)
        done = theirs(kind).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **knobs)
        out.append(done[0, length:].tolist())
    return out


@pytest.mark.parametrize(("kind", "scan"), WAYS)
def test_greedy_rollout(kind, scan):
    # Prefill, cached decode, refills (two slots for five rows) and EOS: a token that they draw in mid-sentence.
    free = their_greedy(kind)
    assert len({tuple(row) for row in free}) == len(free)
    eos = free[0][4]
    want = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(want[0]) < COMPLETION_LEN

    tokens, _ = rows()
    index = jnp.arange(len(LENGTHS), dtype=jnp.int32)
    prompts = Prompts(
        tokens=jnp.asarray(tokens), prompt_len=jnp.array(LENGTHS, jnp.int32), example_id=index, uid=index
    )
    rollout = RolloutConfig(
        group_size=1,
        completion_len=COMPLETION_LEN,
        num_slots=2,
        check_every=3,
        prefill_rows=0,
        eos_id=eos,
        pad_id=0,
    )
    run = jax.jit(
        lambda params, knobs: generate(params, prompts, jax.random.key(0), knobs, config_of(kind, scan), rollout)[0]
    )
    drawn = run(ours(kind), make_sampling(0.0))
    got = [row[mask].tolist() for row, mask in zip(np.asarray(drawn.tokens), np.asarray(drawn.completion_mask))]  # noqa: B905
    assert got == want
