"""NFT, negative-aware fine-tuning (arXiv:2505.18116), and RFT, which learns from right answers alone.

python -m experiments.run --config=nft.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=nft.py:smoke   # seconds
python -m experiments.run --config=nft.py:paper   # the paper's 7B run; needs its checkpoint and data
python -m experiments.run --config=nft.py:rft     # the positives alone
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = (*base.ARGS, "rft")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    config = base.get_config("smoke" if arg == "smoke" else "")
    config.objective = call(
        "nft.objective",
        neg_weight=0.0 if arg == "rft" else 1.0,  # the authors' scripts
        normalize=1,  # the authors' scripts: w = 1 - r, on policy the gradient of Dr.GRPO
        eps=1.0,  # their clamp_negative
        clamp_success_low=0.02,  # their code
        clamp_success_high=0.98,
    )
    config.aggregation.policy = term("sum", divisor=1000.0)  # their code; gradient clipping and AdamW absorb the scale
    config.selection = call("group_filter.mixed", low=0.0, high=1.0)  # their scripts; 512 prompts of 1536 generated
    config.batch.generated_prompts = config.batch.prompts_per_step * 3 // 2  # guess
    config.batch.minibatches = 4  # guess; the authors have 16
    # The objective reads verdicts, not advantages. These are only logged (critic/advantages/*): what NFT is on policy.
    config.advantages = call("grpo.advantages", divide_by_std=False, ddof=1, std_eps=1e-6)
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The authors' train_7B.sh (NVlabs/NFT); the objective is theirs already."""
    paper.model(config, "Qwen2.5-Math-7B")
    files = ("data/dapo-math-17k_10boxed.parquet",)  # DAPO-Math-17k with prompts that ask for a box
    paper.data(config, files=files, **paper.AIME, prompt_len=512, completion_len=3584)
    # Minibatches of 32 prompts; some 5,000 updates, by the paper as we remember it: guess.
    paper.batch(config, prompts=512, group_size=16, minibatches=16, num_steps=320)
    paper.layout(config, "v6e:4x8")
    paper.dynamic_sampling(config, generated_prompts=1536)
    paper.optimizer(config, **paper.DAPO_ADAMW)  # the same values
