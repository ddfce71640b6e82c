"""CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, no token loses its gradient.

python -m experiments.run --config=cispo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=cispo.py:smoke   # seconds
"""

from configs import base
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.objective = call(
        "cispo.objective",
        clip_eps_low=None,  # the paper's: no lower bound (verl's example has 10, which is none either)
        clip_eps_high=0.2,  # verl's example; the paper tunes it and names no value
    )
    config.aggregation.policy = term("token_mean")  # the paper's eq. 4, and verl's
    return config
