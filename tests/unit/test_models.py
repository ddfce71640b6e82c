"""The transformer: its forward by its own laws, and the sampler against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import rollout as rollout_lib
from rl_reason.models import rope, transformer
from rl_reason.models import score as score_lib
from rl_reason.models.attention import causal_attention
from rl_reason.sampling import make_sampling
from tests.support import (
    COMPLETION_LEN,
    EOS,
    GEMMA,
    GLM,
    MOE,
    PAD,
    tiny_model,
    tiny_params,
    tiny_prompts,
    tiny_rollout,
)

TOLERANCE = dict(rtol=0, atol=1e-4)  # nats, fp32: decode and teacher-forced shapes round differently
KINDS = [pytest.param({}, id="dense"), pytest.param(MOE, id="moe"), pytest.param(GEMMA, id="gemma")]
KINDS += [pytest.param(GLM, id="glm")]
forward = jax.jit(transformer.forward, static_argnums=3)
score = jax.jit(score_lib.score, static_argnums=(5, 6))


@functools.cache
def logits_of(model):
    def run(params, tokens):
        hidden = transformer.forward(params, tokens, jnp.ones_like(tokens, bool), model).hidden
        return transformer.logits(hidden, transformer.unembedding(params, model), model)

    return jax.jit(run)


def tokens_for(rows=3, width=6, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, (rows, width)), jnp.int32)


@functools.cache
def sampler(model):
    return jax.jit(
        lambda p, prompts, knobs: rollout_lib.generate(p, prompts, jax.random.key(7), knobs, model, tiny_rollout())
    )


def greedy_by_hand(params, prompts, model):
    """The likeliest token after an uncached forward of all so far, again and again; [B C], PAD after EOS."""
    batch = len(prompts.tokens)
    tokens = np.pad(np.asarray(prompts.tokens), ((0, 0), (0, COMPLETION_LEN)))
    out, alive = np.full((batch, COMPLETION_LEN), PAD), np.ones(batch, bool)
    for t in range(COMPLETION_LEN):
        last = np.asarray(prompts.prompt_len) - 1 + t
        best = np.asarray(logits_of(model)(params, jnp.asarray(tokens)))[np.arange(batch), last].argmax(-1)
        tokens[np.arange(batch), last + 1] = best
        out[alive, t] = best[alive]
        alive &= best != EOS
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan_decode", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sampler_agrees_with_the_forward(kind, scan_decode):
    model = tiny_model(scan_decode=scan_decode, **kind)
    params, prompts = tiny_params(model, scale=3.0), tiny_prompts()
    group = tiny_rollout().group_size

    greedy, _ = sampler(model)(params, prompts, make_sampling(0.0))
    want = np.repeat(greedy_by_hand(params, prompts, model), group, axis=0)
    for row, length in enumerate(np.asarray(greedy.completion_mask.sum(1))):
        start = int(greedy.prompt_len[row])
        np.testing.assert_array_equal(greedy.tokens[row, start : start + length], want[row, :length])
        assert bool(greedy.truncated[row]) == (EOS not in want[row]) and (want[row, length:] == PAD).all()

    for temperature in (1.0, 0.6):
        drawn, _ = sampler(model)(params, prompts, make_sampling(temperature))
        scores = score(
            params,
            drawn.tokens,
            drawn.prompt_len,
            drawn.completion_mask,
            jnp.float32(temperature),
            model,
            COMPLETION_LEN,
        )
        assert int(drawn.completion_mask.sum()) > 8
        np.testing.assert_allclose(drawn.rollout_logprobs, scores.logprobs, **TOLERANCE)
        np.testing.assert_allclose(drawn.sampled_logprobs, scores.logprobs, **TOLERANCE)  # nothing was truncated
    assert sampler(model)._cache_size() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_log_softmax_of_the_forward(kind):
    model = tiny_model(**kind)
    params, prompts = tiny_params(model), tiny_prompts()
    tokens, mask = tokens_for(4, 11), np.zeros((4, 11), bool)
    for row, (start, length) in enumerate(zip(np.asarray(prompts.prompt_len), (6, 1, 0, 3), strict=True)):
        mask[row, start : start + length] = True
    scores = score(params, tokens, prompts.prompt_len, jnp.asarray(mask), jnp.float32(0.5), model, COMPLETION_LEN)
    logprobs = np.asarray(jax.nn.log_softmax(logits_of(model)(params, tokens) / 0.5))[:, :-1]
    picked = np.take_along_axis(logprobs, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.logprobs[:, 1:], np.where(mask[:, 1:], picked, 0), atol=1e-5)
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    np.testing.assert_allclose(scores.entropy[:, 1:], np.where(mask[:, 1:], entropy, 0), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_equal_unrolled_ones(kind):
    tokens, valid = tokens_for(), jnp.ones((3, 6), bool)
    params = tiny_params(tiny_model(**kind))
    unrolled, scanned, remat = (
        forward(params, tokens, valid, tiny_model(**kind, **how))
        for how in (dict(), dict(scan_layers=True), dict(remat="full"))
    )
    for other in (scanned, remat):
        assert jax.tree.structure(other) == jax.tree.structure(unrolled)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(unrolled), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_seen(kind):
    model = tiny_model(**kind)
    params, tokens, valid = tiny_params(model), tokens_for(), jnp.ones((3, 6), bool)
    before = forward(params, tokens, valid, model).hidden
    after = forward(params, tokens.at[:, 4].add(1) % 13, valid, model).hidden
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-6)
    assert float(jnp.abs(after[:, 4:] - before[:, 4:]).max(axis=(0, 2)).min()) > 1e-3  # and the present and past are


def turned(x, position, head_dim, **changes):
    model = tiny_model(head_dim=head_dim, rope_theta=100.0, **changes)
    return rope.rotate(x[None, None], rope.rotations(jnp.array([position]), model).full)[0, 0]


def test_rope_sees_differences_of_positions():
    # <R(m) q, R(n) k> depends on m - n alone; R(0) is the identity.
    q, k = jax.random.normal(jax.random.key(0), (2, 8))

    def dot(m, n):
        return float(turned(q, m, 8) @ turned(k, n, 8))

    assert dot(0, 0) == pytest.approx(float(q @ k), abs=1e-6)
    assert dot(5, 3) == pytest.approx(dot(12, 10), abs=1e-5)
    assert abs(dot(5, 3) - dot(5, 4)) > 1e-3


def test_rope_by_hand():
    # hd 4, theta 100: frequencies 1 and 100^(-1/2) = 0.1; pairs are (0, 2) and (1, 3). Position 3: angles 3 and 0.3.
    got = turned(jnp.array([1.0, 1.0, 0.0, 0.0]), 3, 4)
    np.testing.assert_allclose(got, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], atol=1e-6)


def test_rope_of_a_part_by_hand():
    # 4 channels of 6 turn, as a head of 4 would: theta 100, frequencies 1 and 0.1, pairs (0, 2) and (1, 3); 4 and 5 stay.
    got = turned(jnp.array([1.0, 1.0, 0.0, 0.0, 5.0, -6.0]), 3, 6, rotary_dim=4)
    np.testing.assert_allclose(got, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3), 5, -6], atol=1e-6)
    # And 2 of 4: one pair, (0, 1), of frequency 1. (1, 2) turned by 3 is (cos 3 - 2 sin 3, 2 cos 3 + sin 3).
    got = turned(jnp.array([1.0, 2.0, 3.0, 4.0]), 3, 4, rotary_dim=2)
    np.testing.assert_allclose(got, [np.cos(3) - 2 * np.sin(3), 2 * np.cos(3) + np.sin(3), 3, 4], atol=1e-6)


def test_rope_scalings_by_hand():
    # theta 100, hd 4: frequencies 1 and 0.1, so 16 / (2 pi) = 2.546 and 0.2546 turns in 16 positions. Of llama3 with low 0.2
    # and high 4: kept are (2.546 - 0.2) / 3.8 = 0.6174 of the first and 0.01437 of the second, the rest is divided by 2.
    plain = rope.frequencies(100.0, 4)
    np.testing.assert_allclose(plain, [1, 0.1])
    np.testing.assert_allclose(rope.RopeScaling("linear", 8.0)(plain), [0.125, 0.0125])
    llama3 = rope.RopeScaling("llama3", 2.0, 0.2, 4.0, 16)
    np.testing.assert_allclose(llama3(plain), [(1 + 0.6174) / 2, 0.1 * (1 + 0.01437) / 2], rtol=1e-4)
    # Beyond both: all turns kept, and none.
    np.testing.assert_allclose(rope.RopeScaling("llama3", 2.0, 0.3, 2.0, 16)(plain), [1, 0.05])


@pytest.mark.parametrize("scaling", [("yarn", 2.0), ("linear", 0.0), ("llama3", 8.0), ("linear", 8.0, 1.0, 4.0, 16)])
def test_unknown_scalings_of_rope(scaling):
    with pytest.raises(ValueError, match=r"model\.rope_scaling="):
        rope.RopeScaling(*scaling)


def test_norms_by_hand():
    # rms of (3, 4) is sqrt(12.5); the parameter is 0.5, or 1 + 0.5.
    x, weight = jnp.array([[3.0, 4.0]]), jnp.array([0.5, 0.5])
    for plus_one in (False, True):
        got = transformer.rms_norm(x, weight, tiny_model(norm_plus_one=plus_one, norm_eps=0.0))
        np.testing.assert_allclose(got, (0.5 + plus_one) * np.array([[3, 4]]) / 12.5**0.5, rtol=1e-6)


def test_windows_and_soft_caps():
    # Against the definition: scores capped at 1.5, and the last two columns seen.
    q, k, v = (jax.random.normal(key, (1, 5, 1, 4)) for key in jax.random.split(jax.random.key(1), 3))
    scores = 1.5 * np.tanh(0.3 * np.einsum("nqhd,nshd->nhqs", q, k) / 1.5)
    seen = np.tril(np.ones((5, 5), bool)) & ~np.tril(np.ones((5, 5), bool), -2)
    weights = np.exp(scores) * seen / (np.exp(scores) * seen).sum(-1, keepdims=True)
    for window in (2, jnp.int32(2)):
        got, _ = causal_attention(q, k, v, scale=0.3, soft_cap=1.5, window=window)
        np.testing.assert_allclose(got, np.einsum("nhqs,nshd->nqhd", weights, v), atol=1e-6)


def test_which_layers_have_a_window():
    assert tiny_model().windowed == (False, False)
    assert tiny_model(window=3).windowed == (True, True)
    assert tiny_model(window=3, full_every=3, num_layers=7).windowed == (True, True, False) * 2 + (True,)


def test_grouped_query_attention_equals_repeated_heads():
    q, k, v = (
        jax.random.normal(key, (2, 5, heads, 4))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    grouped, _ = causal_attention(q, k, v)
    repeated, _ = causal_attention(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)
    # And against the definition.
    scores = np.einsum("nqhd,nshd->nhqs", q, np.repeat(k, 2, axis=2)) / 2
    scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(grouped, np.einsum("nhqs,nshd->nqhd", weights, np.repeat(v, 2, axis=2)), atol=1e-6)


def test_parameter_counts():
    # embed 13*8 = 104; a layer: q 8*16 = 128, k and v 64 each, out 128, q_norm and k_norm 4 each, two norms of 8:
    # 408; SwiGLU 3*8*12 = 288. Two layers and a final norm of 8.
    assert transformer.num_params(tiny_model()) == (104 + 2 * (408 + 288) + 8,) * 2
    assert transformer.num_params(tiny_model(tie_embeddings=False))[0] == 2 * 104 + 2 * (408 + 288) + 8
    # Four experts of 288 and a router 8*4 = 32; a token uses two of them.
    assert transformer.num_params(tiny_model(**MOE)) == (
        104 + 2 * (408 + 32 + 4 * 288) + 8,
        104 + 2 * (408 + 32 + 2 * 288) + 8,
    )
    sizes = [x.size for x in jax.tree.leaves(tiny_params(tiny_model(**MOE)))]
    assert sum(sizes) == transformer.num_params(tiny_model(**MOE))[0]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(num_kv_heads=3), r"num_heads=4 is no multiple of num_kv_heads=3"),
        (dict(head_dim=5), r"head_dim=5 must be even"),
        (dict(rotary_dim=3), r"rotary_dim=3 must be even and below head_dim=4; 0 is all of a head"),
        (dict(rotary_dim=4), r"rotary_dim=4 must be even and below"),
        (dict(rotary_dim=-2), r"rotary_dim=-2 must be even"),
        (dict(num_experts=4, experts_per_token=5), r"experts_per_token=5 is not in 1\.\.4"),
        (dict(num_experts=4, experts_per_token=0), r"experts_per_token=0 is not in 1\.\.4"),
        (dict(activation="relu"), r"activation='relu'; there are silu, gelu_tanh"),
        (dict(remat="some"), r"remat='some'; there are none, full, dots, context"),
        (dict(full_every=2), r"full_every=2 needs a model.window"),
    ],
)
def test_shapes_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        tiny_model(**changes)
