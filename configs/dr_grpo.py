"""Dr.GRPO (Understanding R1-Zero-Like Training, arXiv:2503.20783): GRPO without its two divisions.

    python -m experiments.run --config=dr_grpo.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=dr_grpo.py:smoke   # seconds
    python -m experiments.run --config=dr_grpo.py:paper   # the paper's 7B run; needs its checkpoint and data

The divisor is a constant, never the width of a batch. Its value hardly matters: gradient clipping and AdamW absorb a scale.
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    # R - mean; without a deviation ddof and std_eps are idle.
    config.advantages = call("grpo.advantages", divide_by_std=False, ddof=1, std_eps=1e-6)
    # PPO's clip of 0.2 is verl's. There is no KL.
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=None)
    # verl's seq-mean-token-sum-norm: a sum over the limit of a completion, not divided by the number of rows.
    config.aggregation.policy = term("sum", divisor=float(config.rollout.completion_len))
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The authors' examples/qwen2.5-math-7b.sh (sail-sg/understand-r1-zero), and oat's defaults where it says nothing."""
    paper.model(config, "Qwen2.5-Math-7B")
    files = ("data/math_lvl3to5_8k.parquet",)
    paper.data(config, files=files, **paper.MATH_500, prompt_len=1024, completion_len=3000)
    # Updates of 128 completions; 20 epochs of some 8,500 prompts.
    paper.batch(config, prompts=128, group_size=8, minibatches=8, num_steps=1320)
    paper.layout(config, "v6e:4x4")
    # b2 and no weight decay are oat's defaults (oat/args.py); its constant rate has no warm-up.
    paper.optimizer(config, learning_rate=1e-6, warmup_steps=0, decay="constant", weight_decay=0.0, b2=0.95)
    config.aggregation.policy = term("sum", divisor=3000.0)  # generate_max_length
