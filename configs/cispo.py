"""CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, no token loses its gradient.

python -m experiments.run --config=cispo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=cispo.py:smoke   # seconds
python -m experiments.run --config=cispo.py:paper   # the paper's comparison on 32B; needs its checkpoint and data
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.objective = call(
        "cispo.objective",
        clip_eps_low=None,  # the paper's: no lower bound (verl's example has 10, which is none either)
        clip_eps_high=0.2,  # verl's example; the paper tunes it and names no value
    )
    config.aggregation.policy = term("token_mean")  # the paper's eq. 4, and verl's
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """Section 3.1's comparison with DAPO, on its data and with its filter and length penalty; sizes are DAPO's script's."""
    paper.model(config, "Qwen2.5-32B")
    paper.data(config, **paper.DAPO_MATH, **paper.AIME, prompt_len=2048, completion_len=20480)
    # The paper's 16 updates a rollout. 320 steps are a guess.
    paper.batch(config, prompts=512, group_size=16, minibatches=16, num_steps=320)
    paper.layout(config, "v5p:4x4x4", slots=256, microbatch=16, tensor=4)
    paper.dynamic_sampling(config, generated_prompts=1536)
    paper.optimizer(config, **paper.DAPO_ADAMW)
    config.optimizer.update(b2=0.95, eps=1e-15)  # MiniMax-M1's own training
    paper.overlong(config, buffer_len=4096)
