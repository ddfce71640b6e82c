"""REINFORCE leave-one-out (Back to Basics, arXiv:2402.14740), on verl's clipped loss.

python -m experiments.run --config=rloo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=rloo.py:smoke   # seconds
"""

from configs import base
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    # verl's example has the clip of 0.2, 4 updates a rollout and KL in the reward (k1, 0.001); the last is left out here.
    config.advantages = call("rloo.advantages")
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    config.aggregation.policy = term("token_mean")  # verl's
    return config
