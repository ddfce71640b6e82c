"""REINFORCE++-baseline (arXiv:2501.03262): the group's mean as baseline, then whitened over the batch.

python -m experiments.run --config=reinforce_pp_baseline.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=reinforce_pp_baseline.py:smoke   # seconds
python -m experiments.run --config=reinforce_pp_baseline.py:paper   # verl's example on 7B; needs the checkpoint and the data
"""

from configs import base, paper
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.advantages = call("reinforce_pp.baseline_advantages", var_eps=1e-8)  # verl's
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    # KL in the loss as in verl's example, whose "mse" is k2.
    config.regularisers.kl = dict(estimator="k2", coef=0.001, how="token_mean", divisor=1.0)
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """verl's examples/reinforce_plus_plus_trainer/run_qwen2-7b_math_rf_baseline.sh."""
    paper.model(config, "Qwen2-7B-Instruct")
    paper.data(config, **paper.GSM8K_AND_MATH, **paper.GSM8K_AND_MATH_TEST, prompt_len=1024, completion_len=1024)
    paper.batch(config, prompts=1024, group_size=8, minibatches=1, num_steps=210)  # 15 epochs of 14,973 prompts
    paper.layout(config, "v6e:4x8")
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=3e-6)
