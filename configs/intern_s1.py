"""Intern-S1's reinforcement learning: mixed judges, imitation and policy gradient, KL-Cov (arXiv:2508.15763).

    python -m experiments.run --config=intern_s1.py           # a small mixture of experts, minutes on two CPU cores
    python -m experiments.run --config=intern_s1.py:smoke     # seconds
    python -m experiments.run --config=intern_s1.py:paper     # the paper's 241B run; needs its checkpoints and data
    python -m experiments.run --config=intern_s1.py:offline   # best of N: only what a verifier passed is learned from

Sums and sorting are verified by rules; automata by a generative verifier, and differences, as the open-ended prompts, by
a preference model. Both models are trained here first, on answers to the same tasks, and cached.
"""

from configs import base, paper
from configs.common import Config, call, term
from configs.models import JUDGES

ARGS = (*base.ARGS, "offline")


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    smoke, offline = arg == "smoke", arg == "offline"
    config = base.get_config("smoke" if smoke else "")
    config.model.update(num_experts=4, experts_per_token=2, mlp_size=64 if smoke else 128)  # theirs: 128, of which 8
    # Off in their RL configs, and the router is frozen anyway; updates use the experts that the rollout chose.
    config.router.update(balance_coef=0.0, replay=True)
    config.data.update(tasks=("add", "sub", "dfa", "sort"), levels=((2,), (2,), (1, 2), (2,)))
    config.models = dict(
        judge=dict(tasks=("dfa",), **_trained(smoke)),
        preference=dict(tasks=("sub",), focal_gamma=0.0, **_trained(smoke)),
    )
    config.reward = call("mixture_of_rewards.reward", kinds=("rule", "preference", "judge", "rule"))
    config.selection = call(
        "group_filter.mixed", low=0.0, high=1.0
    )  # all right or all wrong is dropped; thresholds: guess
    config.advantages = call("rloo.advantages")  # OREAL's; Intern-S1 publishes none
    # k: the paper's 0.2 may be a percentage, as in KL-Cov's code, or a fraction. The share is 0.002 for the first.
    config.objective = call("intern_s1.objective", wrong_ratio="one", kl_cov_ratio=0.2)
    config.aggregation = dict(
        positive=term("token_mean", over="positive", coef=1.0),  # lambda_sft: not published; guess
        negative=term("token_mean", over="negative", coef=0.0 if offline else 1.0),  # lambda_pg: not published; guess
        kl_cov=term("token_mean", coef=0.0 if offline else 0.01),  # beta
    )
    config.batch.update(minibatches=4)  # theirs: 8; with one, KL-Cov does nothing
    config.optimizer.update(
        learning_rate=1e-4,  # guess; theirs is 5e-7
        frozen=("router",),
        skip_above_norm=5.0,  # guess; theirs is 0.3, for 3% of the updates. Norms are larger here: 2.6 in :smoke
    )
    if offline:  # rejection sampling: a prompt solved at rate p gives something unless all N fail, (1 - p)^N
        config.selection = None
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The online stage, text alone. Its data is not public: three files by kind of prompt stand for it."""
    paper.model(config, "Intern-S1")
    files = tuple(f"data/intern-s1/{source}.parquet" for source in ("mathematics", "open_ended", "science"))
    # The paper caps no lengths in print, and evaluates at temperature 0.7; prompts a step and completion are guesses.
    paper.data(config, files=files, **paper.AIME, prompt_len=2048, completion_len=32768)
    config.data.references = True
    paper.batch(config, prompts=512, group_size=8, minibatches=8, num_steps=600)  # 4096 completions a step
    paper.layout(config, "v5p:4x8x8", microbatch=64, tensor=4, expert=16)
    # Weight decay and betas: guess.
    paper.optimizer(config, learning_rate=5e-7, warmup_steps=0, decay="constant", weight_decay=0.01, b2=0.999)
    config.optimizer.skip_above_norm = 0.3
    # CompassVerifier-7B and POLAR-7B, but in the policy's own tokens: here judges read what the policy writes, in graph.
    untrained = dict(num_steps=0, steps_per_call=1, batch_size=1, learning_rate=0.0)
    frozen = dict(param_dtype="bfloat16")
    config.models = dict(
        judge=dict(tasks=("science",), model=JUDGES["CompassVerifier-7B"] | frozen, **untrained),
        preference=dict(tasks=("open_ended",), focal_gamma=2.0, model=JUDGES["POLAR-7B"] | frozen, **untrained),
    )
    config.reward.kinds = ("rule", "preference", "judge")  # of the files' sources, in alphabetical order


def _trained(smoke: bool) -> Config:
    """A small dense transformer and how it is trained; all guesses."""
    return dict(
        model=dict(num_layers=2, hidden_size=32 if smoke else 64, mlp_size=64 if smoke else 128),
        num_steps=4 if smoke else 250,
        steps_per_call=2 if smoke else 25,
        batch_size=16 if smoke else 64,
        learning_rate=2e-3,
    )
