"""REINFORCE++ (arXiv:2501.03262): returns whitened over the batch, with a KL penalty at each token.

python -m experiments.run --config=reinforce_pp.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=reinforce_pp.py:smoke   # seconds
"""

from configs import base
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.advantages = call(
        "reinforce_pp.advantages_with_kl",
        gamma=1.0,  # the paper's and verl's
        var_eps=1e-8,  # verl's
        kl_estimator="k1",  # the paper's
        kl_coef=0.001,  # verl's default for KL in the reward; its own example has the same in the loss, as k2
    )
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    return config
