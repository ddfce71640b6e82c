"""NFT, negative-aware fine-tuning (arXiv:2505.18116), and RFT, which learns from right answers alone.

python -m experiments.run --config=nft.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=nft.py:smoke   # seconds
python -m experiments.run --config=nft.py:rft     # the positives alone
"""

from configs import base
from configs.common import Config, call, term

ARGS = (*base.ARGS, "rft")


def get_config(arg: str = "") -> Config:
    if arg not in ARGS:
        raise ValueError(f"no variant {arg!r}; there are: bare, {', '.join(a for a in ARGS if a)}.")
    config = base.get_config("" if arg == "rft" else arg)
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
    return config
