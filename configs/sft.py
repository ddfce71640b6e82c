"""Supervised fine-tuning: maximum likelihood on worked solutions, packed into rows.

    python -m experiments.run --config=sft.py         # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=sft.py:smoke   # seconds
    python -m experiments.run --config=sft.py:paper   # LUFFY's baseline on 7B; needs its checkpoint and data

What the methods that learn from demonstrations are compared with. Step for step it sees about as many tokens as `base`
does in RL.
"""

from configs import base, paper
from configs.common import Config

ARGS = base.ARGS


def get_config(arg: str = "") -> Config:
    config = base.get_config("" if arg == "paper" else arg)
    config.loop = "supervised"
    config.optimizer.learning_rate = 1e-3  # guess, between the warm-up's and RL's
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The supervised baseline of LUFFY (arXiv:2504.14945)."""
    paper.model(config, "Qwen2.5-Math-7B-16k-think")
    files = ("data/openr1.parquet",)  # as in luffy.py:paper
    paper.data(config, files=files, **paper.AIME, prompt_len=1024, completion_len=8192)
    config.data.demonstration_key = "target"
    # Rows of 16,384 tokens, 64 to a batch. Theirs hold one example each, ours are packed; 3 epochs of 45.8k at theirs.
    config.supervised.update(rows_per_step=64, row_len_tokens=16384)
    paper.batch(config, prompts=64, group_size=1, minibatches=1, num_steps=2140)  # of which this loop reads the steps
    paper.layout(config, "v6e:4x8", microbatch=64, tensor=1)
    # Warm-up over a tenth; after it a constant rate, weight decay and b2 as in RL: guess.
    paper.optimizer(config, learning_rate=5e-5, warmup_steps=214, decay="constant", weight_decay=0.01, b2=0.999)
