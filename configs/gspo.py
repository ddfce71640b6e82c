"""GSPO (Group Sequence Policy Optimization, arXiv:2507.18071).

    python -m experiments.run --config=gspo.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=gspo.py:smoke   # seconds
    python -m experiments.run --config=gspo.py:paper   # on a mixture of 30B; needs its checkpoint and data

A completion's ratio is the geometric mean of its tokens', so it is far nearer to 1 than theirs, and so is the clip.
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.objective = call(
        "gspo.objective",
        # The paper's 3e-4 and 4e-4 are for completions of thousands of tokens; a mean of some twenty log-ratios moves
        # more, and so does a small model.
        clip_eps_low=0.03,  # guess
        clip_eps_high=0.04,  # guess
    )
    config.aggregation.policy = term("seq_mean_token_mean")  # eq. 5, and always in verl
    config.batch.minibatches = 4  # the paper's
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The paper's model, clip and minibatches; the rest is verl's examples/gspo_trainer/test_gspo_qwen30b_a3b_ep.sh."""
    paper.model(config, "Qwen3-30B-A3B-Base")  # the paper's is fine-tuned from it, and its problems are not named
    paper.data(config, **paper.DAPO_MATH, **paper.AIME, prompt_len=2048, completion_len=8192)
    paper.batch(config, prompts=256, group_size=16, minibatches=4, num_steps=300)  # the script has 8 minibatches
    paper.layout(config, "v5p:4x4x4", microbatch=64, tensor=1, expert=8)
    paper.optimizer(config, **paper.DAPO_ADAMW)
    paper.overlong(config, buffer_len=4096)
    config.objective = call("gspo.objective", clip_eps_low=3e-4, clip_eps_high=4e-4)  # section 5.1
