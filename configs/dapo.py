"""DAPO (arXiv:2503.14476): higher upper clip, dynamic sampling, token mean, soft overlong punishment, no KL.

python -m experiments.run --config=dapo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=dapo.py:smoke   # seconds
python -m experiments.run --config=dapo.py:paper   # the paper's 32B run; needs its checkpoint and data
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    # verl's 32B script trains on 512 of 1536 generated prompts and draws at most 10 rounds of them.
    config.batch.generated_prompts = config.batch.prompts_per_step * 3 // 2  # guess
    config.batch.max_rounds = 2  # guess
    config.selection = call("group_filter.mixed", low=0.0, high=1.0)
    limit = config.rollout.get_ref("completion_len")  # follows an override
    config.reward = call(
        "overlong.reward",
        right=1.0,  # verl's DAPO scripts
        wrong=-1.0,
        max_len_tokens=limit,
        buffer_len_tokens=limit // 5,  # DAPO's share, 4096 of 20480; guess at this length
        penalty_factor=1.0,
    )
    config.advantages = call("grpo.advantages", divide_by_std=True, ddof=1, std_eps=1e-6)  # verl's
    # The clip is the paper's, the dual clip its scripts'.
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.28, dual_clip_ratio=10.0)
    config.aggregation.policy = term("token_mean")
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """verl's recipe/dapo/run_dapo_qwen2.5_32b.sh, by the authors."""
    paper.model(config, "Qwen2.5-32B")
    # The punishment's 4096 tokens are a fifth of the limit.
    paper.data(config, **paper.DAPO_MATH, **paper.AIME, prompt_len=2048, completion_len=20480)
    # Minibatches of 32 prompts. The script trains one epoch of a file that repeats its prompts; 320 steps are a guess.
    paper.batch(config, prompts=512, group_size=16, minibatches=16, num_steps=320)
    paper.layout(config, "v5p:4x4x4", slots=256, microbatch=16, tensor=4)
    paper.dynamic_sampling(config, generated_prompts=1536)
    paper.optimizer(config, **paper.DAPO_ADAMW)  # the paper's warm-up is 20 rollouts
