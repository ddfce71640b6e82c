"""REINFORCE++ (arXiv:2501.03262): returns whitened over the batch, with a KL penalty at each token.

python -m experiments.run --config=reinforce_pp.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=reinforce_pp.py:smoke   # seconds
python -m experiments.run --config=reinforce_pp.py:paper   # verl's example on 7B; needs the checkpoint and the data
"""

from configs import base, paper
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.advantages = call(
        "reinforce_pp.advantages_with_kl",
        gamma=1.0,  # the paper's and verl's
        var_eps=1e-8,  # verl's
        kl_estimator="k1",  # the paper's
        kl_coef=0.001,  # verl's default for KL in the reward; its own example has the same in the loss, as k2
    )
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """verl's examples/reinforce_plus_plus_trainer/run_qwen2-7b_math_rf.sh, but for KL: the paper's, in the reward."""
    paper.model(config, "Qwen2-7B-Instruct")
    paper.data(config, **paper.GSM8K_AND_MATH, **paper.GSM8K_AND_MATH_TEST, prompt_len=1024, completion_len=1024)
    paper.batch(config, prompts=1024, group_size=8, minibatches=1, num_steps=210)  # 15 epochs of 14,973 prompts
    paper.layout(config, "v6e:4x8")
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=3e-6)
