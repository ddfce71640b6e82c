"""Published models, by the name of their checkpoint: shapes, and where their function parts from the others'. Pure data, for
``config.model``.

Sources are each model's config.json on Hugging Face, read in copies: slime's scripts/models for Qwen2.5 and Qwen3, with the
theta of Qwen2.5-Math among them; logged configs for Qwen2-7B-Instruct and Llama 3.1; xtuner's and lmdeploy's configs for
Intern-S1's language models; a logged config of glm-4-9b-chat; the defaults of transformers' configurations, which are a
published model's each, for the others. Vocabularies are the padded ones of the checkpoints. A test compares parameter counts
with those published. Vision towers are left out.

GLM-4's checkpoints have two formats: read is transformers' (-hf), not that of the code which comes with the older one.
POLAR's, which is InternLM2's, is not read: of it there are only sizes and cost.
"""

import typing

Shapes = dict[str, typing.Any]

# What is true of a plain model of the Llama kind, and what each family changes.
_LLAMA: Shapes = dict(
    activation="silu",
    qkv_bias=False,
    qk_norm=False,
    post_norms=False,
    norm_plus_one=False,
    scale_embeddings=False,
    query_scale=0.0,
    attention_soft_cap=0.0,
    final_soft_cap=0.0,
    rope_scaling=None,
    rope_theta_local=0.0,
    rotary_dim=0,
    window=0,
    full_every=0,
    num_experts=0,
    experts_per_token=0,
)
_LLAMA_31: Shapes = _LLAMA | dict(
    rope_scaling=dict(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    ),
    max_position=131072,
)
_QWEN2: Shapes = _LLAMA | dict(qkv_bias=True)
_QWEN3: Shapes = _LLAMA | dict(qk_norm=True)
_GLM: Shapes = _LLAMA | dict(qkv_bias=True, rotary_dim=64)  # half of a head
_GEMMA: Shapes = _LLAMA | dict(activation="gelu_tanh", post_norms=True, norm_plus_one=True, scale_embeddings=True)
_GEMMA2: Shapes = _GEMMA | dict(attention_soft_cap=50.0, final_soft_cap=30.0, window=4096, full_every=2)
_GEMMA3: Shapes = _GEMMA | dict(qk_norm=True, rope_theta_local=1e4, full_every=6)


def _model(
    family: Shapes,
    layers: int,
    hidden: int,
    heads: tuple[int, int],
    mlp: int,
    vocab: int,
    *,
    theta: float,
    positions: int,
    eps: float = 1e-6,
    tied: bool = False,
    head_dim: int = 128,
    **changes: typing.Any,
) -> Shapes:
    """``heads``: of queries, and of keys and values. ``mlp``: the size of one expert, where there are some."""
    shapes = dict(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        mlp_size=mlp,
        rope_theta=theta,
        norm_eps=eps,
        tie_embeddings=tied,
        max_position=positions,
    )
    return family | shapes | changes


_QWEN3_MOE: Shapes = _QWEN3 | dict(num_experts=128, experts_per_token=8)

_QWEN25_7B = _model(_QWEN2, 28, 3584, (28, 4), 18944, 152064, theta=1e6, positions=131072)
_LINEAR_8 = dict(kind="linear", factor=8.0)

MODELS: dict[str, Shapes] = {
    "Qwen2.5-0.5B": _model(_QWEN2, 24, 896, (14, 2), 4864, 151936, theta=1e6, positions=32768, tied=True, head_dim=64),
    "Qwen2.5-1.5B": _model(_QWEN2, 28, 1536, (12, 2), 8960, 151936, theta=1e6, positions=131072, tied=True),
    "Qwen2.5-7B": _QWEN25_7B,
    "Qwen2-7B-Instruct": _QWEN25_7B | dict(max_position=32768),  # the same shapes
    "OREAL-7B-SFT": _QWEN25_7B,  # fine-tuned from Qwen2.5-7B (arXiv:2502.06781)
    "Qwen2.5-Math-7B": _QWEN25_7B | dict(rope_theta=1e4, max_position=4096),
    # LUFFY's (arXiv:2504.14945): another theta, and 16,384 positions.
    "Qwen2.5-Math-7B-16k-think": _QWEN25_7B | dict(rope_theta=4e4, max_position=16384),
    "Qwen2.5-Math-1.5B": _model(_QWEN2, 28, 1536, (12, 2), 8960, 151936, theta=1e4, positions=4096, tied=True),
    "Qwen2.5-32B": _model(_QWEN2, 64, 5120, (40, 8), 27648, 152064, theta=1e6, positions=131072, eps=1e-5),
    "Llama-3.1-8B": _model(_LLAMA_31, 32, 4096, (32, 8), 14336, 128256, theta=5e5, positions=131072, eps=1e-5),
    # Its RoPE is scaled beyond these positions only, and longer rows are refused.
    "internlm3-8b-instruct": _model(_LLAMA, 48, 4096, (32, 2), 10240, 128512, theta=5e7, positions=32768, eps=1e-5),
    # transformers' GlmConfig; theta is 10,000 times the rope_ratio in glm-4-9b-chat's config.json, as its converter has it.
    "glm-4-9b-chat-hf": _model(_GLM, 40, 4096, (32, 2), 13696, 151552, theta=5e6, positions=131072, eps=1.5625e-7),
    # Layers, widths, heads and vocabulary are deepseek-llm-7b's; theta and eps are from memory: guess.
    "deepseek-math-7b-instruct": _model(_LLAMA, 30, 4096, (32, 32), 11008, 102400, theta=1e4, positions=4096),
    "Qwen3-0.6B": _model(_QWEN3, 28, 1024, (16, 8), 3072, 151936, theta=1e6, positions=40960, tied=True),
    "Qwen3-30B-A3B-Base": _model(_QWEN3_MOE, 48, 2048, (32, 4), 768, 151936, theta=1e6, positions=32768),
    "Qwen3-235B-A22B": _model(_QWEN3_MOE, 94, 4096, (64, 4), 1536, 151936, theta=1e6, positions=40960),
    "Intern-S1": _model(_QWEN3_MOE, 94, 4096, (64, 4), 1536, 153216, theta=1e6, positions=40960),  # arXiv:2508.15763
    "Intern-S1-mini": _model(_QWEN3, 36, 4096, (32, 8), 12288, 153216, theta=1e6, positions=40960),
    # transformers' Gemma2Config; its scores are divided by sqrt(256), which is sqrt(head_dim).
    "gemma-2-9b": _model(
        _GEMMA2, 42, 3584, (16, 8), 14336, 256000, theta=1e4, positions=8192, tied=True, head_dim=256
    ),
    # Gemma 3's sizes are from memory of their config.json; their tests are the published counts: guess.
    "gemma-3-1b-pt": _model(
        _GEMMA3, 26, 1152, (4, 1), 6912, 262144, theta=1e6, positions=32768, tied=True, head_dim=256, window=512
    ),
    "gemma-3-4b-pt": _model(
        _GEMMA3 | dict(rope_scaling=_LINEAR_8, window=1024),
        *(34, 2560, (8, 4), 10240, 262208),
        theta=1e6,
        positions=131072,
        tied=True,
        head_dim=256,
    ),
    "Mixtral-8x7B-v0.1": _model(
        _LLAMA | dict(num_experts=8, experts_per_token=2),
        *(32, 4096, (32, 8), 14336, 32000),
        theta=1e6,
        positions=32768,
        eps=1e-5,
    ),
}

# Models that judge, less their vocabularies: here they read the policy's tokens. CompassVerifier is a Qwen2.5, POLAR-7B has
# the sizes of InternLM2-7B, from memory: guess.
JUDGES: dict[str, Shapes] = {
    name: {key: value for key, value in sizes.items() if key != "vocab_size"}
    for name, sizes in {
        "CompassVerifier-7B": _QWEN25_7B,
        "POLAR-7B": _model(_LLAMA, 32, 4096, (32, 8), 14336, 92544, theta=1e6, positions=32768, eps=1e-5),
    }.items()
}
