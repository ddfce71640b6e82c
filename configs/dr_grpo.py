"""Dr.GRPO (Understanding R1-Zero-Like Training, arXiv:2503.20783): GRPO without its two divisions.

    python -m experiments.run --config=dr_grpo.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=dr_grpo.py:smoke   # seconds

The divisor is a constant, never the width of a batch. Its value hardly matters: gradient clipping and AdamW absorb a scale.
"""

from configs import base
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    # R - mean; without a deviation ddof and std_eps are idle.
    config.advantages = call("grpo.advantages", divide_by_std=False, ddof=1, std_eps=1e-6)
    # PPO's clip of 0.2 is verl's. There is no KL.
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=None)
    # verl's seq-mean-token-sum-norm: a sum over the limit of a completion, not divided by the number of rows.
    config.aggregation.policy = term("sum", divisor=float(config.rollout.completion_len))
    return config
