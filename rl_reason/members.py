"""The policies of ``config.cohort``: a config for each, and the vote that is their reward."""

import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from configs.common import Config
from rl_reason.methods import rlccf
from rl_reason.slots import Slot, did_you_mean

MAY_DIFFER = ("seed", "weights", "tokenizer", "model", "data", "warmup", "optimizer")
OF_WARM_UP = (
    "tasks",
    "levels",
    "weights",
    "num_examples",
)  # keys of data: prompts are the cohort's, the rest is shared
SEEDS_PER_RUN = 1000


def configs(config: Config) -> dict[str, Config]:
    """The config of each policy, by name: the run's with what ``config.cohort`` changes, as if it trained alone.

    A policy's ``seed`` counts from ``SEEDS_PER_RUN`` times the run's, so that a run with another seed has other policies.

    Raises:
        ValueError: no policies, or what they cannot change, or two that would draw the same numbers.
    """
    changes = config.cohort.to_dict()
    if config.loop != "cohort":
        if changes:
            raise ValueError(
                f"config.cohort names {', '.join(changes)}, and config.loop={config.loop!r} trains one policy; "
                "set config.loop='cohort'."
            )
        return {}
    if not changes:
        raise ValueError(
            "config.loop='cohort' has no policies; give config.cohort one or more, by name: "
            "config.cohort = dict(small=dict(seed=1, model=dict(num_layers=2)), ...)."
        )
    if config.verify not in ("graph", "split"):
        raise ValueError(
            f"config.loop='cohort' votes once all have drawn, and config.verify={config.verify!r} asks while one draws; set "
            "config.verify='graph', with tasks that have such a verifier, or 'split'."
        )
    found = {name: _config_of(config, name, own) for name, own in changes.items()}
    tokenizers = {own.tokenizer for own in found.values()}
    if config.verify == "graph" and len(tokenizers) > 1:
        raise ValueError(
            f"The policies of config.cohort have tokenizers {', '.join(sorted(tokenizers))}, and in graph answers are "
            "compared token by token; set config.verify='split'."
        )
    _check_seeds({name: own["seed"] for name, own in changes.items()})
    return found


def _config_of(config: Config, name: str, changes: Mapping[str, typing.Any]) -> Config:
    where = f"config.cohort.{name}"
    if unknown := sorted(set(changes) - set(MAY_DIFFER)):
        raise ValueError(
            f"{where} has {', '.join(unknown)}.{did_you_mean(unknown[0], MAY_DIFFER)} A policy of a cohort may have its own "
            f"{', '.join(MAY_DIFFER)}; everything else is shared."
        )
    if not isinstance(changes.get("seed"), int) or not 0 < changes["seed"] < SEEDS_PER_RUN:
        raise ValueError(
            f"{where}.seed={changes.get('seed')!r}; each policy needs a seed of its own between 1 and {SEEDS_PER_RUN - 1}. "
            "Its weights, its warm-up and its samples are drawn with it."
        )
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.loop, own.cohort = "rl", {}
        own.seed = SEEDS_PER_RUN * config.seed + changes["seed"]
        for section, values in changes.items():
            if section == "seed":
                continue
            if section in ("weights", "tokenizer"):
                own[section] = values
                continue
            known = OF_WARM_UP if section == "data" else tuple(own[section])
            if unknown := sorted(set(values) - set(known)):
                hint = did_you_mean(unknown[0], known)
                raise ValueError(
                    f"{where}.{section} has {', '.join(unknown)}.{hint} Of {section} a policy may have its own "
                    f"{', '.join(known)}."
                )
            own[section].update(values)
    return own


def _check_seeds(seeds: Mapping[str, int]) -> None:
    by_seed: dict[int, list[str]] = {}
    for name, seed in seeds.items():
        by_seed.setdefault(seed, []).append(name)
    if shared := [f"{' and '.join(names)} have {seed}" for seed, names in by_seed.items() if len(names) > 1]:
        raise ValueError(
            f"The seeds of config.cohort are not all different: {'; '.join(shared)}. Policies with one seed draw with the "
            "same random numbers; if they are equal, one voter is counted twice."
        )


def check_vote(config: Config, reward: Slot | None, policies: int, group_size: int) -> None:
    """Refuses a reward slot that is no vote of a cohort.

    Raises:
        ValueError: naming those there are.
    """
    cure = "Take call('rlccf.vote'), call('rlccf.plain_vote') or call('rlccf.own_vote')."
    fn = config.reward.fn
    assert reward is not None, "it is no optional slot"
    if reward.wants != {"answers"}:
        raise ValueError(
            f"config.reward.fn={fn!r} asks for {', '.join(sorted(reward.wants)) or 'nothing'}; the reward of a cohort is "
            f"its vote, a function of answers alone. {cure}"
        )
    answers = jax.ShapeDtypeStruct((1, policies, group_size), jnp.int32)
    out = jax.eval_shape(typing.cast(Callable, reward.fn), answers)
    if not isinstance(out, rlccf.Vote):
        raise ValueError(f"config.reward.fn={fn!r} does not give the Vote of rl_reason/methods/rlccf.py. {cure}")
