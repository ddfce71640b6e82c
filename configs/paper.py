"""What every ``:paper`` variant says, in five calls; a config then adds its method's own values. Pure data.

``:paper`` is the paper's own model, data, batch, lengths, optimizer and method values. It needs the checkpoint's folder
with its tokenizer, and the files of data that it names; without those it is traced by tests and not run. Nothing has a
default here that a paper would report.

Prompts are chats, rendered by the checkpoint's own template, as verl and xtuner do for every model, base models too; that
the papers with other code do so is a guess.

What is not the papers': held-out answers are sampled as in training, where most papers lower temperature and top-p; answers
are compared by ``rl_reason.tasks.math_answer`` in place of each repository's grader. How the work is laid out on devices
(mesh, slots, microbatches, workers) changes no result, and all of it is a guess.
"""

import typing

from configs.common import Config, call
from configs.models import MODELS

Values = dict[str, typing.Any]
VERIFIER = "rl_reason.tasks.math_answer:compute_score"
# DAPO-Math-17k. Its prompts ask for a last line "Answer: ...", which the verifier does not read: let them ask for \boxed{}.
DAPO_MATH: Values = dict(files=("data/dapo-math-17k.parquet",))
GSM8K_AND_MATH: Values = dict(files=("data/gsm8k/train.parquet", "data/math/train.parquet"))
# What is held out: of AIME 32 samples a question, which the papers report as avg@32, of larger sets one.
AIME: Values = dict(heldout_files=("data/aime-2024.parquet",), num_prompts=30, num_samples=32)
MATH_500: Values = dict(heldout_files=("data/math500.parquet",), num_prompts=500, num_samples=1)
GSM8K_AND_MATH_TEST: Values = dict(
    heldout_files=("data/gsm8k/test.parquet", "data/math/test.parquet"), num_prompts=1024, num_samples=1
)
# What verl's scripts leave alone: torch's betas, a constant rate, decay 0.01 (its config of actor.optim).
VERL_ADAMW: Values = dict(warmup_steps=0, decay="constant", weight_decay=0.01, b2=0.999)
# What its DAPO scripts set.
DAPO_ADAMW: Values = dict(learning_rate=1e-6, warmup_steps=10, decay="constant", weight_decay=0.1, b2=0.999)


def model(config: Config, name: str) -> None:
    """A published model's shapes, tokenizer and chat template, cut over all devices, in bfloat16 with weights in float32."""
    config.model.update(
        MODELS[name], dtype="bfloat16", param_dtype="float32", scan_layers=True, scan_decode=True, remat="full"
    )
    config.weights = config.tokenizer = f"checkpoints/{name}"
    config.data.chat = "template"
    config.warmup.update(tasks=(), levels=(), num_steps=0)
    config.router.update(balance_coef=0.0)  # off in RL, as in xtuner's and slime's configs
    config.rollout.check_every = 8
    config.steps_per_call = 1  # a step takes minutes


def data(
    config: Config,
    *,
    files: tuple[str, ...],
    heldout_files: tuple[str, ...],
    num_prompts: int,
    num_samples: int,
    prompt_len: int,
    completion_len: int,
) -> None:
    """Rows of files, scored by worker processes. Lengths in tokens; prompts that are longer are dropped, as in the papers.

    ``num_prompts``, each sampled ``num_samples`` times, are evaluated.
    """
    config.data.update(
        tasks=(),
        levels=(),
        num_examples=0,
        files=files,
        heldout_files=heldout_files,
        verifier=VERIFIER,
        on_long_prompt="drop",
        max_prompt_len_tokens=prompt_len,
    )
    config.rollout.completion_len = completion_len
    config.verify = "split"
    config.verifier.update(num_workers=16, deadline_s=10.0)
    config.evaluation.update(num_prompts=num_prompts, num_samples=num_samples, every=20, num_slots=512)
    config.checkpoint.update(every=20)


def batch(config: Config, *, prompts: int, group_size: int, minibatches: int, num_steps: int) -> None:
    """Prompts of a step, all trained on: filters add ``dynamic_sampling``, votes and demonstrations their own keys."""
    config.batch.update(
        prompts_per_step=prompts,
        generated_prompts=prompts,
        group_size=group_size,
        train_group_size=group_size,
        max_rounds=1,
        minibatches=minibatches,
    )
    config.num_steps = num_steps


def layout(
    config: Config, topology: str, *, slots: int = 512, prefill: int = 64, microbatch: int = 32, **mesh: int
) -> None:
    """The slice that a step compiles for and fits (docs/ahead_of_time.md), and how it is laid out there. No paper's values.

    Row shards (fsdp times expert) divide the prompts of a minibatch. ``slots`` decode at a time, ``prefill`` prompts and
    ``microbatch`` rows pass the model at a time. A device holds and reads one part in ``tensor`` of the weights while it
    decodes. Of most models' 4 key heads 2 should be left to it: 1 takes as much memory as 2 in a TPU's tiles.
    """
    config.topology = topology
    config.mesh.update(dict(data=1, fsdp=-1, tensor=2, expert=1) | mesh)
    config.rollout.update(num_slots=slots, prefill_rows=prefill, layout="decode")
    config.batch.microbatch_rows = microbatch


def dynamic_sampling(config: Config, *, generated_prompts: int) -> None:
    """DAPO's filter as its scripts have it: groups that are neither all right nor all wrong, from at most 10 rounds."""
    config.selection = call("group_filter.mixed", low=0.0, high=1.0)
    config.batch.update(generated_prompts=generated_prompts, max_rounds=10)


def overlong(config: Config, *, buffer_len: int) -> None:
    """DAPO's reward: 1 and -1, less what the last ``buffer_len`` tokens of the limit cost."""
    config.reward = call(
        "overlong.reward",
        right=1.0,
        wrong=-1.0,
        max_len_tokens=config.rollout.completion_len,
        buffer_len_tokens=buffer_len,
        penalty_factor=1.0,
    )


def optimizer(
    config: Config, *, learning_rate: float, warmup_steps: int, decay: str, weight_decay: float, b2: float
) -> None:
    """AdamW behind a clip of the gradient's norm at 1. ``warmup_steps`` are rollouts, whose updates ours counts."""
    updates = config.batch.minibatches * config.batch.epochs
    config.optimizer.update(
        learning_rate=learning_rate,
        lr_warmup_updates=warmup_steps * updates,
        lr_decay=decay,
        weight_decay=weight_decay,
        b1=0.9,
        b2=b2,
        grad_clip=1.0,
    )


def entropy_mechanism(config: Config) -> None:
    """The 7B runs of arXiv:2505.22617, as the authors' scripts have them (PRIME-RL/Entropy-Mechanism-of-RL, recipe/dapo)."""
    model(config, "Qwen2.5-7B")
    data(config, **DAPO_MATH, **AIME, prompt_len=2048, completion_len=8192)
    # Minibatches of 32 prompts; 300 steps are the 2400 updates of the paper's law study: guess.
    batch(config, prompts=256, group_size=8, minibatches=8, num_steps=300)
    dynamic_sampling(config, generated_prompts=768)  # 3 times what is trained on, as in DAPO's script: guess
    layout(config, "v6e:4x8", prefill=32)
    # 5e-7 in their fork, 1e-6 in verl's recipe. The warm-up is not in our notes of the script: guess.
    optimizer(config, learning_rate=5e-7, warmup_steps=0, decay="constant", weight_decay=0.0, b2=0.999)
