"""REINFORCE++-baseline (arXiv:2501.03262): the group's mean as baseline, then whitened over the batch.

python -m experiments.run --config=reinforce_pp_baseline.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=reinforce_pp_baseline.py:smoke   # seconds
"""

from configs import base
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.advantages = call("reinforce_pp.baseline_advantages", var_eps=1e-8)  # verl's
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    # KL in the loss as in verl's example, whose "mse" is k2.
    config.regularisers.kl = dict(estimator="k2", coef=0.001, how="token_mean", divisor=1.0)
    return config
