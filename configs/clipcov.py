"""Clip-Cov (The Entropy Mechanism of RL for Reasoning Language Models, arXiv:2505.22617, section 4.2).

python -m experiments.run --config=clipcov.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=clipcov.py:smoke   # seconds
python -m experiments.run --config=clipcov.py:paper   # the paper's 7B run; needs its checkpoint and data
"""

from configs import base, paper
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.objective = call(
        "clip_cov.objective",
        clip_eps_low=1.0,  # the authors' 7b_clip_cov.sh: PPO's own clip is all but off
        clip_eps_high=1.0,
        # The paper's ratio is 2e-4 with bounds 1 and 5, for 7B models at 2,000,000 tokens a batch. A small model's batch
        # has some 10,000 tokens and its covariances stay under 1, so those values would touch two tokens or none.
        clip_cov_ratio=0.02,  # guess
        clip_cov_low=0.05,  # guess
        clip_cov_high=5.0,
    )
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    paper.entropy_mechanism(config)
    config.objective = call(
        "clip_cov.objective",
        clip_eps_low=1.0,  # this and the rest: the authors' 7b_clip_cov.sh
        clip_eps_high=1.0,
        clip_cov_ratio=2e-4,
        clip_cov_low=1.0,
        clip_cov_high=5.0,
    )
