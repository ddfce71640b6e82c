"""Supervised fine-tuning: maximum likelihood on worked solutions, packed into rows.

    python -m experiments.run --config=sft.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=sft.py:smoke   # seconds

What the methods that learn from demonstrations are compared with. Step for step it sees about as many tokens as `base`
does in RL.
"""

from configs import base
from configs.common import Config

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.loop = "supervised"
    config.optimizer.learning_rate = 1e-3  # guess, between the warm-up's and RL's
    return config
