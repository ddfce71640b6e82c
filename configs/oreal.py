"""OREAL (Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning, arXiv:2502.06781).

    python -m experiments.run --config=oreal.py                   # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=oreal.py:smoke             # seconds
    python -m experiments.run --config=oreal.py:paper             # the paper's 7B run; needs its checkpoint and data
    python -m experiments.run --config=oreal.py:no_token_reward   # every token of a completion counts the same

Imitation of right completions, a policy gradient on wrong ones, KL to the initial model. A token reward model, begun as a
copy of the policy, learns beside it and says which tokens matter; the policy waits while it learns first.
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = (*base.ARGS, "no_token_reward")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    config = base.get_config("smoke" if arg == "smoke" else "")
    smoke = arg == "smoke"
    config.reward = call("verdict.reward", right=1.0, wrong=-1.0)
    config.selection = call("oreal.one_of_each")
    config.advantages = call("rloo.sampled_advantages")  # of all samples, before the selection
    config.objective = call("oreal.objective", token_weights="none" if arg == "no_token_reward" else "running_mean")
    config.aggregation = dict(
        positive=term("token_mean", over="positive", coef=1.0),
        negative=term("token_mean", over="negative", coef=0.5),
        kl=term("token_mean", coef=0.01),
    )
    # 64 prompts of 16 samples, of which two are trained on, in one update a rollout.
    config.batch.update(
        prompts_per_step=8 if smoke else 64,
        generated_prompts=8 if smoke else 64,
        group_size=8 if smoke else 16,
        train_group_size=2,
        minibatches=1,
    )
    if arg != "no_token_reward":
        config.token_reward = dict(
            learning_rate=1e-4
        )  # guess; theirs is four times the policy's, which learns nothing here
        config.optimizer.frozen_updates = 2 if smoke else 10  # the authors freeze the actor for 10 steps
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The authors' oreal_w_tokenrm_OREAL-7B-SFT_seqlen16k.py (InternLM/OREAL at 2859cc0)."""
    paper.model(config, "OREAL-7B-SFT")
    # Their prompts, each repeated 6, 4, 4 or 2 times by its pass rate. 16,384 tokens in all.
    files = ("data/oreal-rl-prompts.parquet",)
    paper.data(config, files=files, **paper.MATH_500, prompt_len=2384, completion_len=14000)
    config.rollout.top_p = 0.9
    paper.batch(config, prompts=64, group_size=16, minibatches=1, num_steps=90)
    paper.layout(config, "v6e:4x8", slots=256, microbatch=16)
    config.batch.train_group_size = 2
    # Cosine from 5e-7 to 1e-7; b2 is not set: guess, torch's.
    paper.optimizer(config, learning_rate=5e-7, warmup_steps=10, decay="cosine", weight_decay=0.01, b2=0.999)
    config.optimizer.lr_end_fraction = 0.2
    config.token_reward = dict(learning_rate=2e-6)  # theirs falls to 4e-7 by a cosine; ours is constant
    config.evaluation.every = 10
    config.checkpoint.every = 10
