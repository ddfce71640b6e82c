"""Our transformer is Qwen3's: the same logits, scores and greedy tokens as ``transformers`` on the same tiny weights.

Everything in fp32 on a CPU. Their weights are random, drawn here so that attention and routing are far from uniform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.models import score as score_lib
from rl_reason.models import transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig, generate
from rl_reason.sampling import make_sampling
from rl_reason.types import Prompts

# torch and transformers warn of their own deprecations while they are imported.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 61, 64, 3, 4, 2, 24, 80  # head_dim is not HIDDEN / HEADS
EXPERTS, PER_TOKEN = 6, 2
LENGTHS, COMPLETION_LEN = (7, 3, 1, 6, 5), 9
TOLERANCE = 1e-4  # of the largest value compared
KINDS = ("tied", "untied", "moe")


@functools.cache
def theirs(kind):
    """A tiny Qwen3 or Qwen3-MoE of ``transformers``, in fp32, with weights of unit gain."""
    import torch
    import transformers

    shapes = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=MLP,
        rms_norm_eps=1e-6,
        tie_word_embeddings=kind == "tied",
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    if kind == "moe":
        routing = dict(num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, moe_intermediate_size=MLP)
        config = transformers.Qwen3MoeConfig(**shapes, **routing, norm_topk_prob=True, decoder_sparse_step=1)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shapes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "lm_head" in name else parameter.shape[-1] ** -0.5))
    return model.float().eval()


def config_of(kind, scan=False) -> ModelConfig:
    """The same shapes in our words; theta is read from their config, whichever way this version spells it."""
    config = theirs(kind).config
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    return ModelConfig(
        vocab_size=VOCAB,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mlp_size=MLP,
        rope_theta=float(theta),
        norm_eps=1e-6,
        tie_embeddings=kind == "tied",
        num_experts=EXPERTS if kind == "moe" else 0,
        experts_per_token=PER_TOKEN if kind == "moe" else 0,
        dtype="float32",
        param_dtype="float32",
        scan_layers=scan,
        scan_decode=scan,
        remat=False,
    )


def stacked_experts(weights, prefix):
    """gate, up [E D F] and down [E F D] of one layer: one module an expert before transformers 5, fused since."""
    fused = weights.get(f"{prefix}.gate_up_proj")
    if fused is not None:  # [E, 2F, D] and [E, D, F], applied by F.linear
        gate, up = np.split(fused, 2, axis=1)
        return gate.swapaxes(1, 2), up.swapaxes(1, 2), weights[f"{prefix}.down_proj"].swapaxes(1, 2)
    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(np.stack([weights[f"{prefix}.{e}.{name}.weight"].T for e in range(EXPERTS)]) for name in names)


def layer_params(weights, index, kind):
    """One layer of theirs as a layer of ours; torch's linear weights are [out, in], ours [in, out]."""
    of = lambda name: weights[f"model.layers.{index}.{name}.weight"]
    heads = lambda name: dict(kernel=of(name).T.reshape(HIDDEN, -1, HEAD_DIM))
    params = dict(
        attention=dict(
            q=heads("self_attn.q_proj"),
            k=heads("self_attn.k_proj"),
            v=heads("self_attn.v_proj"),
            out=dict(kernel=of("self_attn.o_proj").T.reshape(HEADS, HEAD_DIM, HIDDEN)),
            q_norm=dict(scale=of("self_attn.q_norm")),
            k_norm=dict(scale=of("self_attn.k_norm")),
        ),
        attention_norm=dict(scale=of("input_layernorm")),
        mlp_norm=dict(scale=of("post_attention_layernorm")),
    )
    if kind == "moe":
        gate, up, down = stacked_experts(weights, f"model.layers.{index}.mlp.experts")
        return params | dict(moe=dict(router=of("mlp.gate").T, gate=gate, up=up, down=down))
    return params | dict(mlp={name: dict(kernel=of(f"mlp.{name}_proj").T) for name in ("gate", "up", "down")})


@functools.cache
def ours(kind):
    """Their weights in our tree. Our input embeddings are scaled by sqrt(D), theirs are not, so the factor is taken
    out of ``embed``; where that is the head too, the final norm gives it back. Both are exact: sqrt(64) is 8.
    """
    weights = {name: x.detach().numpy() for name, x in theirs(kind).state_dict().items()}
    layers = [layer_params(weights, i, kind) for i in range(LAYERS)]
    scale = HIDDEN**0.5
    params = dict(
        embed=weights["model.embed_tokens.weight"] / scale,
        layers=jax.tree.map(lambda *x: np.stack(x), *layers),
        final_norm=weights["model.norm.weight"] * (scale if kind == "tied" else 1.0),
    )
    if kind != "tied":
        params["unembed"] = weights["lm_head.weight"].T
    params = jax.tree.map(jnp.asarray, params)
    want = jax.eval_shape(lambda key: transformer.init(key, config_of(kind)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)
    return params


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


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, scan):
    model = config_of(kind, scan)
    tokens, valid = rows(extra=2)

    @jax.jit
    def run(params, tokens, valid):
        return transformer.forward(params, tokens, valid, model).hidden @ transformer.unembedding(params, model)

    want = their_logits(kind, tokens, valid)
    assert want[valid].std() > 0.5  # not a flat distribution, which anything would match
    assert_near(np.asarray(run(ours(kind), tokens, valid))[valid], want[valid])


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", KINDS)
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
