"""TTRL (Test-Time Reinforcement Learning, arXiv:2504.16084): the majority of a question's samples is its label.

    python -m experiments.run --config=ttrl.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=ttrl.py:smoke   # seconds

Trained and evaluated on the same held-out questions, which the warm-up never saw. Their answers are used for metrics and
for the audit at the end alone.
"""

from configs import base
from configs.common import Config, call

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config(arg)
    smoke = arg == "smoke"
    config.reward = call("ttrl.reward")
    config.answer_rule = "v2"  # the code of August 2025; "v1" is that of May
    # 64 votes, of which the first 32 are trained on; prompts and minibatches are guesses, the authors' 8 and 1 prompt.
    config.batch.update(
        prompts_per_step=4 if smoke else 16,
        generated_prompts=4 if smoke else 16,
        group_size=8 if smoke else 64,
        train_group_size=4 if smoke else 32,
        minibatches=2,
    )
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)
    config.regularisers.kl = dict(estimator="k3", coef=0.001, how="token_mean", divisor=1.0)  # to the initial model
    config.data.update(train_split="heldout", num_examples=16 if smoke else 200)  # AMC has 83 questions, MATH-500 500
    config.evaluation.update(num_prompts=16 if smoke else 200, num_samples=2 if smoke else 16)  # mean@16
    return config
