"""Shapes of published models, by the name of their checkpoint. Pure data, for ``config.model``.

Our transformer is Qwen3's: RMSNorm on queries and keys, no bias anywhere. Qwen3 and Intern-S1's language models are exactly
that. Qwen2.5 and Qwen2 have biases on queries, keys and values and no such norms, Llama and DeepSeekMath have neither, and
Llama 3.1 rescales RoPE's low frequencies besides: of these the presets give the sizes and the cost, not yet the function.
Weights cannot be read from any checkpoint yet, vision towers are left out, and a run of these shapes starts from random
weights.

Sources are each model's config.json on Hugging Face, read in copies: slime's scripts/models for Qwen2.5 and Qwen3, with the
theta of Qwen2.5-Math among them; logged configs for Qwen2-7B-Instruct and Llama 3.1; xtuner's and lmdeploy's configs for
Intern-S1's language models. Vocabularies are the padded ones of the checkpoints. A test compares parameter counts with
those published.
"""

import typing

Shapes = dict[str, typing.Any]
HEAD_DIM = 128  # in all of them


def _dense(
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    mlp: int,
    vocab: int,
    *,
    theta: float,
    eps: float = 1e-6,
    tied: bool = False,
) -> Shapes:
    """``heads``: of queries, and of keys and values."""
    return dict(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=HEAD_DIM,
        mlp_size=mlp,
        rope_theta=theta,
        norm_eps=eps,
        tie_embeddings=tied,
        num_experts=0,
        experts_per_token=0,
    )


def _mixture(*sizes: typing.Any, experts: int, per_token: int, theta: float) -> Shapes:
    """``_dense``, with the size of one expert as ``mlp``."""
    return _dense(*sizes, theta=theta) | dict(num_experts=experts, experts_per_token=per_token)


_QWEN25_7B = _dense(28, 3584, (28, 4), 18944, 152064, theta=1e6)

MODELS: dict[str, Shapes] = {
    "Qwen2.5-7B": _QWEN25_7B,
    "Qwen2-7B-Instruct": _QWEN25_7B,  # the same shapes
    "OREAL-7B-SFT": _QWEN25_7B,  # fine-tuned from Qwen2.5-7B (arXiv:2502.06781)
    "Qwen2.5-Math-7B": _QWEN25_7B | dict(rope_theta=1e4),  # 4096 positions
    "Qwen2.5-Math-7B-16k-think": _QWEN25_7B | dict(rope_theta=4e4),  # LUFFY's (arXiv:2504.14945): 16,384 positions
    "Qwen2.5-Math-1.5B": _dense(28, 1536, (12, 2), 8960, 151936, theta=1e4, tied=True),
    "Qwen2.5-32B": _dense(64, 5120, (40, 8), 27648, 152064, theta=1e6, eps=1e-5),
    "Llama-3.1-8B": _dense(32, 4096, (32, 8), 14336, 128256, theta=5e5, eps=1e-5),
    # InternLM3's and GLM-4's sizes are from memory of their config.json; their tests are the published counts: guess.
    "internlm3-8b-instruct": _dense(48, 4096, (32, 2), 10240, 128512, theta=5e7, eps=1e-5),
    "glm-4-9b-chat": _dense(40, 4096, (32, 2), 13696, 151552, theta=1e4, eps=1.5625e-7),
    # Layers, widths, heads and vocabulary are deepseek-llm-7b's; theta and eps are from memory: guess.
    "deepseek-math-7b-instruct": _dense(30, 4096, (32, 32), 11008, 102400, theta=1e4),
    "Qwen3-30B-A3B-Base": _mixture(48, 2048, (32, 4), 768, 151936, experts=128, per_token=8, theta=1e6),
    "Qwen3-235B-A22B": _mixture(94, 4096, (64, 4), 1536, 151936, experts=128, per_token=8, theta=1e6),
    "Intern-S1": _mixture(94, 4096, (64, 4), 1536, 153216, experts=128, per_token=8, theta=1e6),  # arXiv:2508.15763
    "Intern-S1-mini": _dense(36, 4096, (32, 8), 12288, 153216, theta=1e6),
}

# Models that judge, less their vocabularies: here they read the policy's tokens. CompassVerifier is a Qwen2.5, POLAR-7B has
# the sizes of InternLM2-7B, from memory: guess.
JUDGES: dict[str, Shapes] = {
    name: {key: value for key, value in sizes.items() if key != "vocab_size"}
    for name, sizes in {
        "CompassVerifier-7B": _QWEN25_7B,
        "POLAR-7B": _dense(32, 4096, (32, 8), 14336, 92544, theta=1e6, eps=1e-5),
    }.items()
}
