"""GSPO (Group Sequence Policy Optimization, arXiv:2507.18071).

    python -m experiments.run --config=gspo.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=gspo.py:smoke   # seconds

A completion's ratio is the geometric mean of its tokens', so it is far nearer to 1 than theirs, and so is the clip.
"""

from configs import base
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    config.objective = call(
        "gspo.objective",
        # The paper's 3e-4 and 4e-4 are for completions of thousands of tokens; a mean of some twenty log-ratios moves
        # more, and so does a small model.
        clip_eps_low=0.03,  # guess
        clip_eps_high=0.04,  # guess
    )
    config.aggregation.policy = term("seq_mean_token_mean")  # eq. 5, and always in verl
    config.batch.minibatches = 4  # the paper's
    return config
