"""GRPO (DeepSeekMath, arXiv:2402.03300), with the paper's mean over tokens, then over completions.

python -m experiments.run --config=grpo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=grpo.py:smoke   # seconds
python -m experiments.run --config=grpo.py:paper   # the paper's, with KL; needs DeepSeekMath's checkpoint and the data
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.advantages = call("grpo.advantages", divide_by_std=True, ddof=1, std_eps=1e-6)  # verl's
    # Eq. 3 has no dual clip. The clip of 0.2 is verl's.
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=None)
    config.aggregation.policy = term("seq_mean_token_mean")  # eq. 3; verl's default is token_mean, as in base.py
    # It has KL in the loss too (k3, coefficient 0.04). That is off, as in DAPO and Dr.GRPO; config.regularisers.kl has it.
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """DeepSeekMath's section 4.2, as are all values but those that say otherwise."""
    paper.model(config, "deepseek-math-7b-instruct")
    # 144K questions of GSM8K and MATH, which are not published as such: the two training sets, guess. 512 tokens: guess.
    paper.data(config, **paper.GSM8K_AND_MATH, **paper.GSM8K_AND_MATH_TEST, prompt_len=512, completion_len=1024)
    # A batch of 1024 completions, 64 to a question, and one update; one pass over the 144K is a guess.
    paper.batch(config, prompts=16, group_size=64, minibatches=1, num_steps=9000)
    paper.layout(config, "v6e:4x4", slots=256, microbatch=16, tensor=4)
    # Rate 1e-6; decay and betas are not given: guess, verl's.
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=1e-6)
    config.regularisers.kl = dict(estimator="k3", coef=0.04, how="seq_mean_token_mean", divisor=1.0)  # eq. 3 and 4
