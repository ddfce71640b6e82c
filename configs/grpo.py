"""GRPO (DeepSeekMath, arXiv:2402.03300), with the paper's mean over tokens, then over completions.

python -m experiments.run --config=grpo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=grpo.py:smoke   # seconds
"""

from configs import base
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.advantages = call("grpo.advantages", divide_by_std=True, ddof=1, std_eps=1e-6)  # verl's
    # Eq. 3 has no dual clip. The clip of 0.2 is verl's.
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=None)
    config.aggregation.policy = term("seq_mean_token_mean")  # eq. 3; verl's default is token_mean, as in base.py
    # It has KL in the loss too (k3, coefficient 0.04). That is off, as in DAPO and Dr.GRPO; config.regularisers.kl has it.
    return config
