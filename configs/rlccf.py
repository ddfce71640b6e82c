"""RLCCF (arXiv:2508.12338): several policies learn from their collective vote, weighted by how sure each is of itself.

    python -m experiments.run --config=rlccf.py              # three small models trained here, minutes on two CPU cores
    python -m experiments.run --config=rlccf.py:smoke        # seconds
    python -m experiments.run --config=rlccf.py:paper        # the paper's four models; needs their tokenizers and data
    python -m experiments.run --config=rlccf.py:plain_vote   # every vote counts the same: what the weights are worth
    python -m experiments.run --config=rlccf.py:own_vote     # each by its own majority (TTRL): what the others are worth
    python -m experiments.run --config=rlccf.py:confident    # one policy is sure, and wrong: what the weights cost,
    python -m experiments.run --config=rlccf.py:confident_plain_vote    # and without them

Three specialists, each warmed up on 80% of one task and 10% of either other, answer the same questions. They are trained
and evaluated on those; verdicts are used for metrics and for the audit at the end alone.

The paper publishes no code, and neither learning rate, batch, K, clip, KL coefficient nor temperature: all guesses here.
"""

import ml_collections

from configs import base, paper
from configs.common import Config, call
from configs.models import MODELS

ARGS = (*base.ARGS, "plain_vote", "own_vote", "confident", "confident_plain_vote")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    config = base.get_config("smoke" if arg == "smoke" else "")
    smoke = arg == "smoke"
    config.loop = "cohort"
    config.reward = call(f"rlccf.{arg.removeprefix('confident_')}" if arg.endswith("_vote") else "rlccf.vote")
    config.cohort = specialists(smoke)
    config.num_steps = 4 if smoke else 40
    config.warmup.num_steps = 4 if smoke else 250
    if arg.startswith("confident"):
        _confident(config)
    config.warmup.direct_share = 0.1  # with base's 0.6 nobody is good at sums: 3% right where 30% are with this
    # K = 16 and one update a rollout; guesses.
    config.batch.update(
        prompts_per_step=4 if smoke else 16,
        generated_prompts=4 if smoke else 16,
        group_size=4 if smoke else 16,
        train_group_size=4 if smoke else 16,
        minibatches=1,
    )
    config.optimizer.learning_rate = 3e-5  # guess; at 3e-4 all soon share one wrong answer
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # guess
    # To each policy's own initial weights; guess.
    config.regularisers.kl = dict(estimator="k3", coef=0.001, how="token_mean", divisor=1.0)
    config.data.num_examples = 16 if smoke else 200  # the questions; the paper has 700 of MATH
    config.data.train_split = "heldout"
    config.evaluation.update(num_prompts=16 if smoke else 200)
    # mean@16, and the vote of 3 x 16; the paper's are 32 and 4 x 32.
    config.evaluation.num_samples = 2 if smoke else 16
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """Section 4 of the paper. What it leaves out is a guess: rate, batch, K, lengths, KL coefficient, clip, steps."""
    paper.model(config, "Qwen2.5-7B")
    # 700 problems of MATH, 100 of each subject, their answers for metrics alone; 32 samples a held-out problem.
    held_out: paper.Values = paper.MATH_500 | dict(num_samples=32)
    paper.data(config, files=("data/math700.parquet",), **held_out, prompt_len=1024, completion_len=3072)
    config.data.update(train_split="train", num_examples=0)
    config.answer_rule = "equivalence"  # guess
    paper.batch(config, prompts=32, group_size=16, minibatches=1, num_steps=110)  # guess: five epochs
    paper.layout(config, "v5p:2x4x4", microbatch=64, tensor=1)
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=1e-6)
    # Their Llama is the instruct model, of the same shapes.
    names = ("glm-4-9b-chat-hf", "internlm3-8b-instruct", "Llama-3.1-8B")
    others = {
        name.split("-")[0].lower(): dict(
            seed=seed, weights=f"checkpoints/{name}", tokenizer=f"checkpoints/{name}", model=MODELS[name]
        )
        for seed, name in enumerate(names, start=2)
    }
    config.cohort = ml_collections.ConfigDict(dict(qwen=dict(seed=1), **others))


def specialists(smoke: bool) -> Config:
    """Three policies of different sizes, each good at one of base's tasks: add, sub, dfa."""
    narrow = dict(num_layers=1, mlp_size=32) if smoke else dict(hidden_size=72, head_dim=18, mlp_size=192)
    shallow = dict(num_layers=1 if smoke else 2)
    of = lambda *weights: dict(weights=weights, num_examples=0)  # always new problems to warm up on
    policies = dict(
        sums=dict(seed=1, model=narrow | shallow, data=of(0.8, 0.1, 0.1)),
        differences=dict(seed=2, model=narrow, data=of(0.1, 0.8, 0.1)),
        automata=dict(seed=3, model=shallow, data=of(0.1, 0.1, 0.8)),
    )
    return ml_collections.ConfigDict(policies)


def _confident(config: Config) -> None:
    """Sums alone: two policies that are right about half of the time, and one that forgets carries and is sure; guesses."""
    config.data.update(tasks=("add",), levels=((2,),))
    config.warmup.num_steps = 300
    one, two, careless = (config.cohort[name] for name in ("sums", "differences", "automata"))
    for policy in (one, two, careless):
        del policy.data.weights
    careless.data.tasks = ("rl_reason.tasks.variants:ADD_WITHOUT_CARRY",)
    careless.warmup = ml_collections.ConfigDict(dict(num_steps=600))
    config.cohort = ml_collections.ConfigDict(dict(one=one, two=two, careless=careless))
