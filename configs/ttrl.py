"""TTRL (Test-Time Reinforcement Learning, arXiv:2504.16084): the majority of a question's samples is its label.

    python -m experiments.run --config=ttrl.py              # a small model trained here, minutes on two CPU cores
    python -m experiments.run --config=ttrl.py:smoke        # seconds
    python -m experiments.run --config=ttrl.py:oracle       # the same with the true labels: how far a vote can get
    python -m experiments.run --config=ttrl.py:systematic   # where a vote cannot help: all samples err in the same way,
    python -m experiments.run --config=ttrl.py:binary       # or there are but two answers, so that errors cannot scatter
    python -m experiments.run --config=ttrl.py:paper        # AIME 2024 with 7B; needs its checkpoint and data

Trained and evaluated on the same held-out questions, which the warm-up never saw. Their answers are used for metrics and
for the audit at the end alone.
"""

from configs import base, paper
from configs.common import Config, call

ARGS = (*base.ARGS, "oracle", "systematic", "binary")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    smoke = arg == "smoke"
    config = base.get_config("smoke" if smoke else "")
    config.reward = call("verdict.reward", right=1.0, wrong=0.0) if arg == "oracle" else call("ttrl.reward")
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
    # Problems of varied length that a short warm-up leaves half solved, its errors scattered: votes start out right on
    # about half of them. With a majority that is wrong in one way there is nothing to gain. All guesses.
    config.data.update(tasks=("add", "sub", "dfa"), levels=((2, 3), (2, 3), (1, 2, 3)))
    config.data.update(max_prompt_len_tokens=24, max_demonstration_len_tokens=40)
    config.rollout.completion_len = 40
    config.warmup.direct_share = 0.0
    if not smoke:
        config.warmup.num_steps = 300
    config.data.update(train_split="heldout", num_examples=16 if smoke else 200)  # AMC has 83 questions, MATH-500 500
    config.evaluation.update(num_prompts=16 if smoke else 200, num_samples=2 if smoke else 16)  # mean@16
    if arg == "systematic":  # sums by a policy that was taught to forget the carry
        config.data.update(tasks=("add",), levels=((2, 3),))
        config.warmup.update(tasks=("rl_reason.tasks.variants:ADD_WITHOUT_CARRY",), levels=((2, 3),))
    if arg == "binary":  # automata of two states, by a policy that is right a little more often than a coin
        config.data.update(tasks=("rl_reason.tasks.variants:DFA_OF_TWO",), levels=((3, 4),))
        config.warmup.num_steps = 100
        config.update(verify="split", answer_rule="equivalence")  # a task of one's own is verified on the host
    config.optimizer.learning_rate = 3e-5  # guess: at 1e-4 and above labels go wrong faster than answers get right
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """AIME 2024 with Qwen2.5-Math-7B, by the authors' scripts of August 2025."""
    paper.model(config, "Qwen2.5-Math-7B")
    # The 30 questions, trained on and evaluated on.
    files: paper.Values = dict(files=("data/AIME-TTT/train.parquet",), heldout_files=("data/AIME-TTT/train.parquet",))
    paper.data(config, **files, num_prompts=30, num_samples=16, prompt_len=512, completion_len=3072)  # mean@16
    # Batches of 8, the remainder dropped, 80 times over; minibatches of one question.
    paper.batch(config, prompts=8, group_size=64, minibatches=8, num_steps=240)
    # A minibatch of one prompt cannot be cut over rows, so weights are cut over 4 KV heads.
    paper.layout(config, "v5p:2x2x1", microbatch=8, fsdp=1, tensor=-1)
    config.batch.train_group_size = 32
    # 3% warm-up; cosine to 0.
    paper.optimizer(config, learning_rate=5e-7, warmup_steps=7, decay="cosine", weight_decay=0.01, b2=0.999)
    config.evaluation.every = 2
