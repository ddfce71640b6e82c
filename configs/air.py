"""AIR (annotations, instructions, response pairs; arXiv:2504.03612): which pairs to learn preferences from, by DPO.

    python -m experiments.run --config=air.py                   # small models trained here, minutes on two CPU cores
    python -m experiments.run --config=air.py:smoke             # seconds
    python -m experiments.run --config=air.py:random_pairs      # one rule or none, at the same number of pairs
    python -m experiments.run --config=air.py:paper             # DPO on 14k selected pairs; needs checkpoint and pairs

The policy and three other small models answer, an oracle with noise judges, the rules select, DPO (arXiv:2305.18290)
learns. Variants for the arms of the comparison: random_pairs, extreme_margins, instructions, margins, chosen_score, mix.
"""

from configs import base, paper
from configs.common import Config, call

# Rules of each arm: whether instructions are filtered, then margins, lowest chosen score, mix. The scale is 1..10.
ARMS = {
    "": (True, 2.0, 3.0, 8.0, True),
    "random_pairs": (False, 1.0, 9.0, 1.0, False),
    "extreme_margins": (False, 6.0, 9.0, 1.0, False),  # not published; guess
    "instructions": (True, 1.0, 9.0, 1.0, False),
    "margins": (False, 2.0, 3.0, 1.0, False),
    "chosen_score": (False, 1.0, 9.0, 8.0, False),
    "mix": (False, 1.0, 9.0, 1.0, True),
}
ARGS = (*base.ARGS, *(arm for arm in ARMS if arm))


def get_config(arg: str = "") -> Config:
    base.check_arg(arg, ARGS)
    smoke = arg == "smoke"
    config = base.get_config("smoke" if smoke else "")
    config.loop = "preference"
    p = config.preference
    p.objective = call("dpo.objective", loss_type="sigmoid", beta=0.1, label_smoothing=0.0)  # TRL's
    # Models of four steps write nothing that is worth an 8: the smoke test takes any pair.
    filtered, low, high, chosen, mixed = (True, 1.0, 9.0, 1.0, True) if smoke else ARMS.get(arg, ARMS[""])
    if filtered:
        # The variance is the paper's; ddof is not published, guess.
        p.instructions = call("air.instruction_keep", max_variance=100.0 if smoke else 1.5, ddof=0)
    # Margins, chosen score and about 1:1 of own and others' responses are the paper's.
    p.pairs = call("air.pick", min_margin=low, max_margin=high, min_chosen_score=chosen, mix_policies=mixed)
    # Which models answer is not published; these are guesses, as are the numbers of prompts and pairs (theirs: 14k pairs).
    p.models = (
        dict(name="sibling", seed_offset=1, model=dict(), warmup=dict(num_steps=4 if smoke else 200)),
        dict(name="early", seed_offset=2, model=dict(), warmup=dict(num_steps=2 if smoke else 100)),
        dict(
            name="small",
            seed_offset=3,
            model=dict(num_layers=1 if smoke else 2),
            warmup=dict(num_steps=4 if smoke else 200),
        ),
    )
    p.update(num_prompts=32 if smoke else 4096, num_pairs=8 if smoke else 96)
    config.optimizer.update(learning_rate=1e-4, lr_warmup_updates=8, lr_decay="linear")  # not published; guess
    if arg == "paper":
        _paper(config)
    return config


def _paper(config: Config) -> None:
    """DPO on the pairs that the paper's rules selected. It publishes their number, 14k, and no more: the rest is a guess."""
    paper.model(config, "Llama-3.1-8B")  # from memory a Tulu 3 SFT model of these shapes, with its template
    config.preference.update(files=("data/air-pairs.jsonl",), on_long_pair="drop", models=(), num_pairs=0)
    config.preference.update(pairs_per_step=128, microbatches=16, heldout_every=0)
    paper.layout(config, "v5p:2x2x2", tensor=1)
    config.data.max_prompt_len_tokens = 512  # of 2048 in all
    config.rollout.completion_len = 1536
    config.num_steps = 14_000 // 128  # one epoch
    config.optimizer.update(learning_rate=5e-7, lr_warmup_updates=10, lr_decay="linear", b2=0.999)
    config.evaluation.num_prompts = 0
    config.checkpoint.every = 0
