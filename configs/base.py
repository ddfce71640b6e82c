"""GRPO on the embedded tasks; every key that any experiment may set stands here, with what it means.

python -m experiments.run --config=base.py         # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=base.py:smoke   # seconds
python -m experiments.run --config=base.py:paper   # verl's GRPO example on 7B; needs the checkpoint and the data
"""

import ml_collections
from ml_collections import config_dict

from configs import paper
from configs.common import Config, call, term

ARGS = ("", "smoke", "paper")


def get_config(arg: str = "") -> Config:
    """The embedded default, or with ``arg`` "smoke" something that runs in seconds, or verl's example."""
    check_arg(arg, ARGS)
    config: Config = ml_collections.ConfigDict()
    # "rl", "supervised": maximum likelihood on the data's worked solutions, "preference": learning from pairs, or "cohort":
    # several policies that learn from their vote
    config.loop = "rl"
    config.seed = 0
    config.num_steps = 80
    config.steps_per_call = 4  # K steps in one compiled scan; a chunk should stay under 10 s

    config.model = dict(
        vocab_size=0,  # 0: the tokenizer's; more pads the embedding, as checkpoints do
        num_layers=3,
        hidden_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        mlp_size=256,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        tie_embeddings=True,
        num_experts=0,  # 0: a dense SwiGLU
        experts_per_token=0,
        activation="silu",  # of the feed-forward's gate; or "gelu_tanh"
        qkv_bias=False,
        qk_norm=True,  # RMSNorm on the queries and keys of each head
        post_norms=False,  # RMSNorm on what attention and feed-forward give, too
        norm_plus_one=False,  # norms multiply by 1 + their parameter
        scale_embeddings=True,  # by sqrt(hidden_size)
        query_scale=0.0,  # of scores; 0: head_dim^-0.5
        attention_soft_cap=0.0,  # c tanh(score / c); 0: none
        final_soft_cap=0.0,  # the same of logits
        rope_scaling=config_dict.placeholder(object),  # dict(kind, factor, ...) for long rows, see models/rope.py
        rope_theta_local=0.0,  # of layers with a window; 0: rope_theta
        rotary_dim=0,  # channels of a head that turn with the position, its first; 0: all
        window=0,  # positions that a token sees, its own included; 0: all
        full_every=0,  # with a window, each so-many-th layer sees all; 0: none does
        max_position=0,  # the longest row the model is meant for, in tokens; 0: any
        dtype="float32",
        param_dtype="float32",
        scan_layers=False,
        scan_decode=False,
        remat="none",  # what backward passes compute again: or "full", "dots" or "context", see transformer.REMAT
    )
    # "": random weights. Else the folder of a Hugging Face checkpoint to start from: config.model is its config.json's then,
    # and warmup.num_steps is 0 unless the command line asks for some.
    config.weights = ""
    config.tokenizer = "embedded"  # or a sentencepiece model, or a checkpoint's folder with its tokenizer.json
    # Mixture-of-experts models only. With replay, updates use the experts that each token was given to at rollout.
    config.router = dict(balance_coef=0.001, z_coef=0.0, replay=False)
    config.topology = ""  # the TPU slice that it is meant for, as "v5p:4x4x4"; experiments.compile checks that it fits
    config.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1)

    config.data = dict(
        tasks=("add", "sub", "dfa"),
        levels=((2,), (2,), (1, 2)),  # one tuple a task, () for all. One-digit sums are too few to hold any out
        weights=config_dict.placeholder(tuple),
        train_split="train",  # or "heldout": learning without labels, on the very questions that are evaluated
        num_examples=0,  # RL on so many problems of the tasks, again and again; 0: always new ones
        files=(),
        heldout_files=(),
        verifier=config_dict.placeholder(object),
        prompt_key="prompt",
        answer_key="auto",
        data_source_key="data_source",
        split_key="extra_info.split",
        demonstration_key=config_dict.placeholder(str),
        chat="plain",  # contents with a blank line between; "template": the checkpoint's; or a function, "module:function"
        system_prompt="",  # of chats that bring none, with "template"
        template_variables=config_dict.placeholder(object),  # as dict(enable_thinking=False), with "template"
        shuffle=True,
        on_bad_row="refuse",  # or "skip"
        on_long_prompt="refuse",
        max_prompt_len_tokens=18,
        max_demonstration_len_tokens=24,
        max_reference_len_tokens=8,
        references=False,  # whether prompts bring the oracle's answer; verify="graph" always has them do so
    )

    config.warmup = dict(
        tasks=(),  # to draw worked solutions from, with their levels; () is the data's own
        levels=(),
        num_steps=400,  # 0 starts RL from random weights
        imitation_steps=0,  # then so many on the data's own worked solutions: fine-tuning before RL
        steps_per_call=25,
        batch_size=128,
        direct_share=0.6,  # demonstrations that give the answer without steps: what RL then learns not to do
        learning_rate=2e-3,
        lr_warmup_steps=30,
        weight_decay=0.0,
    )

    config.supervised = dict(rows_per_step=32, row_len_tokens=168, direct_share=0.0)  # of the loop of that name

    config.preference = dict(  # of the loop of that name
        objective=config_dict.placeholder(ml_collections.ConfigDict),  # the loss of a pair
        files=(),  # pairs of your own, .jsonl or .parquet; () makes pairs of responses to data.tasks
        heldout_files=(),  # pairs that are never trained on, with files
        on_bad_row="refuse",  # or "skip"; of files
        on_long_pair="refuse",  # or "drop"
        num_prompts=1024,  # training prompts that are answered; each gives at most one pair
        num_samples=4,  # responses of the policy to each
        num_other_samples=2,  # of each other model
        # The others: dict(name, seed_offset, model, warmup), what differs from the policy's own config; and weights of one
        # that begins with a checkpoint of the same tokenizer, whose config.json is its model.
        models=(),
        prompts_per_call=256,  # answered at a time, which bounds memory
        judge=dict(noise_std=1.0, failure_rate=0.0),  # a stand-in for a judge: the oracle's 1..10, and noise
        instructions=config_dict.placeholder(ml_collections.ConfigDict),  # which prompts to keep; None: all
        pairs=config_dict.placeholder(ml_collections.ConfigDict),  # which two responses to a prompt make a pair
        num_pairs=0,  # so many of the pairs that there are, at random; 0: all
        num_heldout_prompts=256,  # each gives a pair in the oracle's order, never trained on
        heldout_every=20,  # steps between accuracies on held-out pairs; 0: never
        pairs_per_step=32,
        microbatches=1,
        precompute_reference=False,  # True: the initial policy's log-probabilities once, and no copy of it kept
    )

    config.rollout = dict(
        completion_len=24,  # tokens, EOS included
        num_slots=256,
        check_every=4,
        prefill_rows=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        stop=(),  # texts that end a completion, besides EOS, with the token that completes one; or names of special tokens
        # Of the weights while sampling: "train", as they are stored, where each decode step gathers every layer over fsdp
        # (and, but for experts, over expert); or "decode": gathered once a rollout, into a copy that takes as many times
        # more memory, in config.model.dtype. Of no matter where those axes are 1.
        layout="train",
    )
    config.batch = dict(
        prompts_per_step=64,
        group_size=8,
        train_group_size=8,
        generated_prompts=64,
        max_rounds=1,
        minibatches=2,
        epochs=1,
        microbatch_rows=0,
        demonstrations=0,  # rows of a group that are worked solutions; the others are sampled
        waiting_prompts=0,  # places for prompts that a filter kept and a step had no room for; the next draws them anew
    )

    config.verify = "graph"  # "graph", "callback", "split" or "overlapped"
    config.verifier = dict(num_workers=2, deadline_s=5.0)  # not used by "graph"
    config.answer_rule = "v2"  # for votes: "v1", "v2" or "equivalence"; see docs/papers.md, "Comparing answers"
    config.reward = call("verdict.reward", right=1.0, wrong=0.0)
    config.baseline = config_dict.placeholder(ml_collections.ConfigDict)  # what Prompts.baseline is filled with
    config.selection = config_dict.placeholder(ml_collections.ConfigDict)
    config.advantages = call("grpo.advantages", divide_by_std=True, ddof=1, std_eps=1e-6)  # verl's
    config.correction = config_dict.placeholder(ml_collections.ConfigDict)
    config.overlap_correction = call("importance.truncate", max_weight=2.0)  # when verify is "overlapped"; guess
    config.objective = call("grpo.objective", clip_eps_low=0.2, clip_eps_high=0.2, dual_clip_ratio=3.0)  # verl's
    config.aggregation = dict(policy=term("token_mean"))
    config.objective_scope = "minibatch"  # "microbatch" is for parity with the authors' forks
    config.regularisers = dict(
        kl=config_dict.placeholder(object),  # dict(estimator, coef, how, divisor)
        entropy=config_dict.placeholder(object),  # dict(coef, how, divisor)
    )

    # Of the loop "cohort": its policies by name, each with a seed from 1 up and what else it has of its own: weights,
    # tokenizer, and of model, optimizer, warmup, and of data for its warm-up: tasks, levels, weights and num_examples.
    config.cohort = dict()

    # dict(learning_rate) of the token reward model that oreal.objective reads
    config.token_reward = config_dict.placeholder(object)

    # {name: dict(model, tasks, num_steps, steps_per_call, batch_size, learning_rate)} of the frozen models that the reward
    # slot asks: "judge", a generative verifier, and "preference", a reward model, which has a focal_gamma too. They are
    # trained on the data's tasks before the run, and cached.
    config.models = config_dict.placeholder(object)

    config.optimizer = dict(
        learning_rate=3e-4,
        lr_warmup_updates=5,
        frozen_updates=0,  # at a rate of 0, before the warm-up: while a token reward model learns first
        lr_decay="constant",  # or "cosine", "linear" over the run's updates
        lr_end_fraction=0.0,  # of the learning rate, where a decay ends
        weight_decay=0.0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        mu_dtype=config_dict.placeholder(str),  # of first moments, "bfloat16" halves them; None: as the updates, fp32
        grad_clip=1.0,
        skip_above_norm=0.0,  # updates whose gradient norm, before clipping, is larger are skipped and counted; 0: none
        frozen=(),  # parameters that do not learn after the warm-up, by patterns of their paths, as ("router",)
        max_skipped_in_a_row=10,  # updates with a non-finite gradient, before the run stops
    )

    # Adapters that learn in place of the parameters, from the end of the warm-up on; rank 0: none. All kernels and alpha 32
    # are those of thinkingmachines.ai/blog/lora, where the best rates are ten times those of full training.
    config.lora = dict(
        rank=0,
        alpha=32.0,  # W + alpha / rank A B
        targets=("attention", "mlp"),  # patterns of the kernels' paths, as "attention/(q|v)"
        merge_to_sample=True,  # into the weights once a rollout; False: more exact, and slower at every token
    )

    config.evaluation = dict(
        num_prompts=256,
        num_samples=4,
        every=0,  # steps; 0: ends only
        num_slots=256,
    )
    config.checkpoint = dict(every=40, keep=2)  # steps between checkpoints; the last step is always saved
    config.log = dict(
        rollout_groups=2,  # groups of each step written to rollouts/; -1: all
        report=True,  # report.html and plots/ at the end; `python -m experiments.report` makes them at any time
    )

    if arg == "smoke":
        smoke(config)
    if arg == "paper":
        _paper(config)
    return config


def check_arg(arg: str, known: tuple[str, ...]) -> None:
    """Refuses variants that a config does not have.

    Raises:
        ValueError: with those it has.
    """
    if arg not in known:
        raise ValueError(f"no variant {arg!r}; there are: bare, {', '.join(a for a in known if a)}.")


def smoke(config: Config) -> None:
    """Shrinks a config until it runs in seconds; methods call it last, so their own values survive."""
    config.num_steps = 4
    config.steps_per_call = 2
    config.model.update(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=64)
    config.warmup.update(num_steps=4, steps_per_call=2, batch_size=16, lr_warmup_steps=1)
    config.rollout.update(completion_len=24, num_slots=16)
    config.batch.update(prompts_per_step=8, group_size=4, train_group_size=4, generated_prompts=8)
    config.supervised.update(rows_per_step=4, row_len_tokens=96)
    config.preference.update(
        num_prompts=32, num_heldout_prompts=16, prompts_per_call=16, heldout_every=2, pairs_per_step=4
    )
    config.evaluation.update(num_prompts=16, num_samples=2, num_slots=16)
    config.checkpoint.update(every=2)


def _paper(config: Config) -> None:
    """verl's examples/grpo_trainer/run_qwen2-7b_math.sh, as are all values but those that say otherwise."""
    paper.model(config, "Qwen2-7B-Instruct")
    paper.data(config, **paper.GSM8K_AND_MATH, **paper.GSM8K_AND_MATH_TEST, prompt_len=1024, completion_len=1024)
    paper.batch(config, prompts=1024, group_size=5, minibatches=4, num_steps=210)  # 15 epochs of 14,973 prompts
    paper.layout(config, "v6e:4x8")
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=1e-6)
    config.regularisers.kl = dict(estimator="k3", coef=0.001, how="token_mean", divisor=1.0)
