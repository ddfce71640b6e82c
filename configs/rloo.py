"""REINFORCE leave-one-out (Back to Basics, arXiv:2402.14740), on verl's clipped loss.

python -m experiments.run --config=rloo.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=rloo.py:smoke   # seconds
python -m experiments.run --config=rloo.py:paper   # verl's example on 7B; needs the checkpoint and the data
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    # verl's example has the clip of 0.2, 4 updates a rollout and KL in the reward (k1, 0.001); the last is left out here.
    config.advantages = call("rloo.advantages")
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    config.aggregation.policy = term("token_mean")  # verl's
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """verl's examples/rloo_trainer/run_qwen2-7b.sh, less its KL in the reward, for which there is no function here."""
    paper.model(config, "Qwen2-7B-Instruct")
    files: paper.Values = dict(files=("data/gsm8k/train.parquet",), heldout_files=("data/gsm8k/test.parquet",))
    paper.data(config, **files, num_prompts=1024, num_samples=1, prompt_len=512, completion_len=1024)
    paper.batch(config, prompts=1024, group_size=5, minibatches=4, num_steps=105)  # 15 epochs of 7,473 prompts
    paper.layout(config, "v6e:4x8")
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=1e-6)
