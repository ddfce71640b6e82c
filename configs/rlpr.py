"""RLPR (Extrapolating RLVR to General Domains without Verifiers, arXiv:2506.18254), and what it is compared with.

python -m experiments.run --config=rlpr.py                   # a small model trained here, minutes on two CPU cores
python -m experiments.run --config=rlpr.py:smoke             # seconds
python -m experiments.run --config=rlpr.py:paper             # the paper's 7B run; needs its checkpoint and data
python -m experiments.run --config=rlpr.py:verifree          # arXiv:2505.21493
python -m experiments.run --config=rlpr.py:general_reasoner  # arXiv:2505.14652, with the verifier that config.verify names
python -m experiments.run --config=rlpr.py:no_debias         # and no_filter, likelihood: the paper's ablations

The verifier's verdict is a metric here (critic/score), no part of the reward, but for general_reasoner.
"""

from configs import base, paper
from configs.common import Config, call, term

ARGS = (*base.ARGS, "verifree", "general_reasoner", "no_debias", "no_filter", "likelihood")
# The embedded tasks write worked steps, the mark and the answer: no tags but the mark, and no space behind it.
MARK = dict(answer_open="####", pad_with_space=False)


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    smoke = arg == "smoke"
    config = base.get_config("smoke" if smoke else "")
    config.data.references = True
    if arg == "verifree":
        return _verifree(config)
    if arg == "general_reasoner":
        return _general_reasoner(config)
    config.reward = call(
        "rlpr.reward",
        **MARK,
        think_open="",  # the paper's are <think> </think> <answer> </answer>
        think_close="",
        answer_close="",  # the answer ends with EOS
        aggregate="mean_probability",
        round_to_bf16=True,  # as their code does; the baseline is not rounded
        format_coef=0.1,
        repetition_ngram=10,
        repetition_times=10,
        repetition_penalty=1.0,
    )
    if arg != "no_debias":
        config.baseline = call("rlpr.baseline", pad_with_space=False, aggregate="mean_probability")
    if arg != "no_filter":
        config.selection = call(
            "rlpr.filter",
            beta=0.5,  # the authors' for Qwen2.5-7B; 0.9 for Llama, 1.0 for Gemma
            ema_decay=0.99,
            start_record_step=1 if smoke else 6,
            start_filter_step=3 if smoke else 11,
        )
        config.batch.max_rounds = 2  # guess; the authors sample until the batch is full
        config.batch.waiting_prompts = config.batch.generated_prompts  # theirs has no bound
    config.objective = call(
        "grpo.objective", clip_eps_low=0.2, clip_eps_high=0.27, dual_clip_ratio=3.0
    )  # their script
    config.regularisers.entropy = dict(coef=0.001, how="token_mean", divisor=1.0)  # in their code, not in the paper
    if arg == "likelihood":  # the product of the reference's probabilities, not their mean
        config.reward.aggregate = config.baseline.aggregate = "likelihood"
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """The authors' script for Qwen2.5-7B (OpenBMB/RLPR at 8490fca)."""
    paper.model(config, "Qwen2.5-7B")
    # WebInstruct-verified less its mathematics, 77k prompts. Held out, their 638 of WebInstruct, twice each.
    files: paper.Values = dict(files=("data/rlpr_train.parquet",), heldout_files=("data/webinstruct-heldout.parquet",))
    paper.data(config, **files, num_prompts=638, num_samples=2, prompt_len=2048, completion_len=3072)
    config.data.max_reference_len_tokens = 128  # guess; answers of this data are short
    paper.batch(config, prompts=768, group_size=8, minibatches=4, num_steps=320)  # their best checkpoint, issue 16
    paper.layout(config, "v6e:4x8")
    config.batch.update(max_rounds=10, waiting_prompts=768)  # guess; the authors sample until the batch is full
    paper.optimizer(config, **paper.VERL_ADAMW, learning_rate=1e-6)
    tags: paper.Values = dict(answer_open="<answer>", pad_with_space=True)
    config.reward.update(tags, think_open="<think>", think_close="</think>", answer_close="</answer>")
    config.baseline.pad_with_space = True


def _verifree(config: Config) -> Config:
    config.reward = call("verifree.reward", **MARK)
    config.advantages = call("rloo.advantages")
    config.objective = call("verifree.objective")
    config.aggregation = dict(policy=term("seq_mean_token_sum"), reference=term("seq_mean_token_sum"))
    config.batch.minibatches = 1  # guess; without a ratio a rollout is good for one update
    return config


def _general_reasoner(config: Config) -> Config:
    config.reward = call(
        "general_reasoner.reward",
        answer_open="####",
        answer_close="",
        no_answer=-0.5,
        length_coef=0.05,
        max_length_gap_tokens=10,
    )
    config.objective = call("grpo.objective", clip_eps_low=0.3, clip_eps_high=0.3, dual_clip_ratio=3.0)
    config.regularisers.entropy = dict(coef=0.001, how="token_mean", divisor=1.0)
    config.regularisers.kl = dict(estimator="k3", coef=1e-4, how="token_mean", divisor=1.0)
    return config
