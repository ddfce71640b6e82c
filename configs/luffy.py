"""LUFFY (Learning to Reason under Off-Policy Guidance, arXiv:2504.14945).

    python -m experiments.run --config=luffy.py                # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=luffy.py:smoke          # seconds
    python -m experiments.run --config=luffy.py:paper          # the paper's 7B run; needs its checkpoint and data
    python -m experiments.run --config=luffy.py:on_policy      # its baselines: no demonstration in the groups,
    python -m experiments.run --config=luffy.py:rl_with_sft    # demonstrations in a loss term of their own,
    python -m experiments.run --config=luffy.py:sft            # imitation alone,
    python -m experiments.run --config=luffy.py:sft_then_rl    # imitation, then RL without demonstrations

Demonstrations are the tasks' own worked solutions. The warm-up knows shorter sums only, so that samples alone never get a
longer one right and there is something to learn from being shown.
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = (*base.ARGS, "on_policy", "rl_with_sft", "sft", "sft_then_rl")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    config = base.get_config("smoke" if arg == "smoke" else "")
    smoke = arg == "smoke"
    _data(config, smoke)
    alone = arg in ("on_policy", "sft", "sft_then_rl")
    config.batch.demonstrations = 0 if alone else 1  # the authors' n_prefix=1, of groups of 8
    config.advantages = call("grpo.advantages", divide_by_std=False, ddof=1, std_eps=1e-6)  # grpo_use_std=False
    config.objective = call("luffy.objective", shaping_gamma=0.1)
    # A sum over a constant width, not divided by rows (the authors': their response width, 8192).
    width = float(config.rollout.completion_len)
    config.aggregation = dict(policy=term("sum", divisor=width))
    # The bonus is 0.001 in the authors' script, 0.01 in the paper. Beside a sum of a thousand tokens it all but vanishes.
    config.regularisers.entropy = dict(coef=0.001, how="token_mean", divisor=1.0)
    if arg in ("on_policy", "sft_then_rl"):  # the repository's prefix_ratio=0 keeps PPO's clip
        config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=None)
    if arg == "rl_with_sft":  # grpo_split: statistics of samples alone, and a token-mean NLL with coefficient 1
        config.advantages = call("luffy.sampled_advantages", std_eps=1e-6)
        config.objective = call("luffy.imitation_objective", clip_eps_low=0.2, clip_eps_high=0.2)
        config.aggregation = dict(
            policy=term("sum", over="on_policy", divisor=width),
            imitation=term("token_mean", over="off_policy"),
        )
    if arg == "sft":
        config.loop = "supervised"
        config.optimizer.learning_rate = 1e-3  # guess
    if arg == "sft_then_rl":
        config.warmup.imitation_steps = 50  # guess: about as many demonstrations as LUFFY sees in its steps
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The authors' training script (ElliottYan/LUFFY at 01f4ae0)."""
    paper.model(config, "Qwen2.5-Math-7B-16k-think")
    files = ("data/openr1.parquet",)  # OpenR1-Math-46k-8192, whose targets are lists of one message: make them text
    paper.data(config, files=files, **paper.AIME, prompt_len=1024, completion_len=8192)
    config.data.update(demonstration_key="target", max_demonstration_len_tokens=8192)
    # Minibatches of 64 prompts. The script has 30 epochs, 10,700 steps; the paper reports some 500: guess.
    paper.batch(config, prompts=128, group_size=8, minibatches=2, num_steps=500)
    paper.layout(config, "v6e:4x8")
    paper.optimizer(config, learning_rate=1e-6, warmup_steps=0, decay="constant", weight_decay=0.01, b2=0.999)
    config.aggregation = dict(policy=term("sum", divisor=8192.0))


def _data(config: Config, smoke: bool) -> None:
    """Sums of three digits after a warm-up on sums and differences of at most two; all guesses."""
    config.data.update(tasks=("add",), levels=((3,),), max_prompt_len_tokens=16, max_demonstration_len_tokens=40)
    config.warmup.update(tasks=("add", "sub"), levels=((1, 2), (1, 2)), direct_share=0.0)
    config.rollout.completion_len = 40
    config.supervised.row_len_tokens = 96 if smoke else 160
    if not smoke:
        config.num_steps = (
            320  # demonstrations are learned from slowly; samples first get one right after some 120 steps
        )
        config.optimizer.learning_rate = 1e-3
        config.batch.update(prompts_per_step=32, generated_prompts=32)
        config.warmup.num_steps = 75  # a demonstrated token then has a median probability of 0.16, and no sum is right
