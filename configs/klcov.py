"""KL-Cov (The Entropy Mechanism of RL for Reasoning Language Models, arXiv:2505.22617, section 4.3).

    python -m experiments.run --config=klcov.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=klcov.py:smoke   # seconds
    python -m experiments.run --config=klcov.py:paper   # the paper's 7B run; needs its checkpoint and data

The penalty vanishes where the ratio is 1, so it needs several updates a rollout: at least 4 minibatches.
"""

from configs import base, paper
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.objective = call(
        "kl_cov.objective",
        kl_cov_ratio=0.02,  # guess; the paper's 2e-3 (7B) would touch some twenty tokens of a small batch
        kl_cov_coef=1.0,  # the authors' 7b_kl_cov.sh
    )
    config.batch.minibatches = 4
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    paper.entropy_mechanism(config)
    config.objective = call(
        "kl_cov.objective",
        kl_cov_ratio=2e-3,  # the authors' 7b_kl_cov.sh: k_percent=0.2
        kl_cov_coef=1.0,
    )
