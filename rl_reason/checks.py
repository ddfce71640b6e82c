"""What is wrong with a config, found before anything compiles. Each raises ValueError, naming the key and the cure."""

import typing
from collections.abc import Mapping, Sequence

from configs.common import Config
from rl_reason import aggregation
from rl_reason.data import tokenizer as tokenizers
from rl_reason.data.example import SPLITS
from rl_reason.data.sources import Source
from rl_reason.data.stream import demonstration_tokens, prompt_tokens, reference_tokens
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.models.transformer import ModelConfig
from rl_reason.tasks.answer_ids import RULES
from rl_reason.tasks.in_graph import WITNESS

LOOPS = ("rl", "supervised", "preference", "cohort")
VERIFY = ("graph", "callback", "split", "overlapped")
LOOKED_AT = 64  # examples of each source: those that are too long are mostly found now, not after a warm-up


def run(config: Config) -> None:
    """The words and numbers of a run as such."""
    if config.loop not in LOOPS:
        raise ValueError(f"config.loop={config.loop!r}; there are {', '.join(LOOPS)}.")
    if config.verify not in VERIFY:
        raise ValueError(f"config.verify={config.verify!r}; there are {', '.join(VERIFY)}.")
    if config.answer_rule not in RULES:
        raise ValueError(f"config.answer_rule={config.answer_rule!r}; there are {', '.join(RULES)}.")
    if config.data.train_split not in SPLITS:
        raise ValueError(f"config.data.train_split={config.data.train_split!r}; there are {', '.join(SPLITS)}.")
    if config.objective_scope not in ("minibatch", "microbatch"):
        raise ValueError(f"config.objective_scope={config.objective_scope!r}; there are minibatch, microbatch.")
    per_call = config.steps_per_call
    for key in ("num_steps", "checkpoint.every", "evaluation.every"):
        value = config[key] if "." not in key else config[key.split(".")[0]][key.split(".")[1]]
        if per_call < 1 or value < 0 or value % per_call:
            raise ValueError(
                f"config.{key}={value} is no multiple of config.steps_per_call={per_call}: the compiled loop runs "
                f"{per_call} steps at a time. Nearest: {value // max(per_call, 1) * per_call} or "
                f"{(value // max(per_call, 1) + 1) * per_call}."
            )
    for key in ("num_steps", "imitation_steps"):
        if config.warmup[key] % max(config.warmup.steps_per_call, 1):
            raise ValueError(
                f"config.warmup.{key}={config.warmup[key]} is no multiple of "
                f"warmup.steps_per_call={config.warmup.steps_per_call}."
            )


def positions(config: Config, model: ModelConfig) -> None:
    """No row longer than the model is meant for: beyond, it would answer nonsense without a word."""
    if config.loop == "supervised":
        longest, keys = config.supervised.row_len_tokens, "config.supervised.row_len_tokens"
    else:
        longest = config.data.max_prompt_len_tokens + config.rollout.completion_len
        keys = "config.data.max_prompt_len_tokens and config.rollout.completion_len together"
    if model.max_position and longest > model.max_position:
        raise ValueError(
            f"{keys} are {longest} tokens, and config.model.max_position={model.max_position}: shorten them, or set "
            "config.model.max_position=0 if the model does follow longer rows."
        )


def examples(config: Config, source: Source) -> None:
    """What methods read of prompts has to be there, before anything compiles."""
    example = source.example(0)
    if config.data.references and example.reference is None:
        raise ValueError(
            f"{config.reward.fn} reads reference answers, and the data has none; set config.data.answer_key to their column."
        )
    if config.batch.demonstrations and example.demonstration is None:
        raise ValueError(
            f"config.batch.demonstrations={config.batch.demonstrations}, and the data has no worked solutions; set "
            "config.data.demonstration_key to their column."
        )


def answers(config: Config) -> None:
    """Votes have to find answers: whose host compares them reads boxes alone under v2, and tasks have marks."""
    if config.data.tasks and config.verify != "graph" and config.answer_rule == "v2":
        raise ValueError(
            f"config.verify={config.verify!r} compares answers on the host, where config.answer_rule='v2' reads boxes "
            "alone, and the answers of config.data.tasks follow ####: nobody would have a vote. Set "
            "config.answer_rule='equivalence'."
        )


def lengths(config: Config, tokenizer: Tokenizer, sources: Sequence[Source]) -> None:
    """The first examples of each source have to fit.

    Raises:
        ExampleError: names the example and the key.
    """
    data = config.data
    shown = config.batch.demonstrations or (config.warmup.num_steps and not data.files)
    for source in sources:
        for uid in range(LOOKED_AT):
            example = source.example(uid)
            prompt_tokens(tokenizer, example, data.max_prompt_len_tokens)
            if shown and example.demonstration is not None:
                demonstration_tokens(tokenizer, example, data.max_demonstration_len_tokens)
            if example.reference is not None and (config.verify == "graph" or data.references):
                reference_tokens(tokenizer, example, data.max_reference_len_tokens)


def witnesses(config: Config, tokenizer: Tokenizer, source: Source) -> None:
    """Tasks with several right answers are verified in graph by reading the prompt, so nothing may stand before it."""
    reads = sorted(set(source.names) & set(WITNESS))
    if reads and tokenizer.decode(tokenizer.prompt("x")) != "x":
        raise ValueError(
            f"config.verify='graph' reads the prompts of {', '.join(reads)} from their first byte, and with "
            f"config.tokenizer={config.tokenizer!r} and data.chat={config.data.chat!r} a prompt begins otherwise; set "
            "config.verify='callback' or 'split'."
        )


def regularisers(given: Mapping[str, typing.Any]) -> None:
    """KL and entropy terms that the loop could not add."""
    wanted = {"kl": {"estimator", "coef", "how", "divisor"}, "entropy": {"coef", "how", "divisor"}}
    for name, keys in given.items():
        where = f"config.regularisers.{name}"
        if keys is None:
            continue
        if set(keys) != wanted[name]:
            raise ValueError(f"{where} has keys {sorted(keys)}; it takes exactly {sorted(wanted[name])}.")
        if keys["how"] not in aggregation.HOW or keys["divisor"] <= 0:
            raise ValueError(
                f"{where}: how={keys['how']!r}, divisor={keys['divisor']}; how is one of {', '.join(aggregation.HOW)}, "
                "and divisor is above 0."
            )
    kl = given["kl"]
    if kl is not None and kl["estimator"] not in ("k1", "k2", "k3"):
        raise ValueError(f"config.regularisers.kl.estimator={kl['estimator']!r}; there are k1, k2, k3.")


def vocabulary(config: Config, name: str, tokenizer: Tokenizer) -> None:
    """Another model's checkpoint has the tokens of the policy's tokenizer.

    Raises:
        ValueError: a tokenizer with others, or none.
    """
    if not config.weights:
        return
    where = f"config.preference.models: {name!r} begins with {config.weights!r}"
    try:
        own = tokenizers.load(config.weights)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if own.piece_bytes != tokenizer.piece_bytes:
        raise ValueError(
            f"{where}, whose tokens are not those of config.tokenizer={config.tokenizer!r}, and responses are told apart "
            "by their token ids. Take a model of the same family."
        )
