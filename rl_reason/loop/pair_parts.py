"""What a preference run has beside ``Parts``: ``config.preference`` resolved and checked before anything compiles."""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from configs.common import Config
from rl_reason import slots
from rl_reason.data.pairs import LoadedPairs, PairReading, load_pairs
from rl_reason.data.preferences import KeepInstructions, PickPairs
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.loop.preference import PreferenceSetting
from rl_reason.slots import Slot

POLICY = "policy"  # what responses of the model that is to be trained are signed with
CHANGES, OPTIONAL = {"name", "seed_offset", "model", "warmup"}, {"weights"}  # of config.preference.models
_PAIR_ARRAYS = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")


@dataclasses.dataclass(frozen=True)
class PairParts:
    """The loss of a pair, and where pairs come from: files, or rules about the responses of several models."""

    setting: PreferenceSetting
    train_files: LoadedPairs | None
    heldout_files: LoadedPairs | None
    instructions: Slot | None  # None: all
    pairs: Slot | None  # None with files

    @property
    def keep_instructions(self) -> KeepInstructions | None:
        """``make_pairs``' argument of that name."""
        slot = self.instructions
        return None if slot is None else lambda scores: slot(dict(scores=scores))

    @property
    def pick_pairs(self) -> PickPairs:
        """``make_pairs``' argument of that name."""
        slot, names = self.pairs, ("scores", "on_policy", "response_id", "keep", "key")
        assert slot is not None, "pairs of files are not picked"
        return lambda *offered: slot(dict(zip(names, offered, strict=True)))


def from_config(config: Config, tokenizer: Tokenizer, row_shards: int) -> PairParts:
    """Reads the files, binds the slots, and tries their hyperparameters on shapes alone.

    Raises:
        ValueError: naming the key and the cure.
    """
    p = config.preference
    if p.objective is None:
        raise ValueError(
            "config.loop='preference' and config.preference.objective is None; set it to a loss of pairs, such as "
            "call('dpo.objective', loss_type='sigmoid', beta=0.1, label_smoothing=0.0)."
        )
    if not p.files and not config.data.tasks:
        raise ValueError(
            "config.loop='preference' has nothing to make pairs of: set config.preference.files to pairs of your own "
            "(.jsonl or .parquet), or config.data.tasks, whose oracles judge the responses of small models."
        )
    if p.heldout_files and not p.files:
        raise ValueError(
            "config.preference.heldout_files goes with config.preference.files; tasks hold out by content."
        )
    _check_numbers(config, row_shards)
    objective = slots.resolve("pair_objective", p.objective.to_dict())
    setting = PreferenceSetting(objective, config.rollout.completion_len, config.rollout.temperature, p.microbatches)
    lengths = dict(chosen_len=_shape(1, dtype=jnp.int32), rejected_len=_shape(1, dtype=jnp.int32))
    _try(objective, {name: _shape(1) for name in _PAIR_ARRAYS} | lengths)
    if p.files:
        read = functools.partial(_load, config, tokenizer)
        return PairParts(setting, read("files"), read("heldout_files") if p.heldout_files else None, None, None)
    return PairParts(setting, None, None, _instructions(config), _pairs(config))


def other_configs(config: Config) -> dict[str, Config]:
    """The config of each other model that answers, by name: the run's own with the entry's changes.

    Seeds are offsets to the run's, so that no other model is ever the policy of another seed's run.

    Raises:
        ValueError: keys that an entry, ``config.model`` or ``config.warmup`` does not have, or names taken twice.
    """
    found: dict[str, Config] = {}
    for number, given in enumerate(() if config.preference.files else config.preference.models):
        entry, where = dict(given), f"config.preference.models[{number}]"
        if set(entry) - OPTIONAL != CHANGES:
            raise ValueError(
                f"{where} has keys {sorted(entry)}; it takes exactly {sorted(CHANGES)}, and weights where it begins with a "
                "checkpoint."
            )
        if not str(entry["name"]).isidentifier() or entry["name"] in (POLICY, *found):
            raise ValueError(
                f"{where}.name={entry['name']!r}: names are distinct identifiers, and {POLICY!r} is the trained model."
            )
        other = config.copy_and_resolve_references()
        other.loop, other.seed = "rl", config.seed + entry["seed_offset"]  # it draws completions, and no pairs
        weights = entry.get("weights", "")
        if weights or entry["model"]:
            other.weights = weights  # config.weights are of the policy's model
        if weights:
            other.model.update(entry["model"])  # as its config.json has it
        for section in ("warmup",) if weights else ("model", "warmup"):
            for key, value in entry[section].items():
                if key not in other[section]:
                    hint = slots.did_you_mean(key, other[section])
                    raise ValueError(f"{where}.{section} has {key!r}, which config.{section} does not.{hint}")
                if type(value) is not type(other[section][key]):
                    raise ValueError(
                        f"{where}.{section}.{key}={value!r}; config.{section} has {other[section][key]!r}."
                    )
                other[section][key] = value
        found[entry["name"]] = other
    return found


def _check_numbers(config: Config, row_shards: int) -> None:
    p = config.preference
    at_least = dict(num_prompts=1, num_samples=1, num_other_samples=1, prompts_per_call=1, pairs_per_step=1)
    at_least |= dict(microbatches=1, num_pairs=0, num_heldout_prompts=0, heldout_every=0)
    for key, least in at_least.items():
        if p[key] < least:
            raise ValueError(f"config.preference.{key}={p[key]} must be at least {least}.")
    if p.judge.noise_std < 0 or not 0 <= p.judge.failure_rate <= 1:
        raise ValueError(
            f"config.preference.judge={p.judge.to_dict()}: noise_std must be at least 0, failure_rate in [0, 1]."
        )
    share = p.pairs_per_step / (p.microbatches * row_shards)
    if not share.is_integer():
        raise ValueError(
            f"config.preference does not divide: pairs_per_step={p.pairs_per_step} / microbatches={p.microbatches} over "
            f"{row_shards} row shards (mesh data x fsdp x expert) = {share:g} pairs; use a multiple of "
            f"{p.microbatches * row_shards}."
        )
    if p.heldout_every % config.steps_per_call:
        raise ValueError(
            f"config.preference.heldout_every={p.heldout_every} is no multiple of "
            f"config.steps_per_call={config.steps_per_call}."
        )


def _load(config: Config, tokenizer: Tokenizer, key: str) -> LoadedPairs:
    p, paths = config.preference, config.preference[key]
    reading = PairReading(
        max_prompt_len_tokens=config.data.max_prompt_len_tokens,
        max_completion_len_tokens=config.rollout.completion_len,
        chat=config.data.chat,
        on_bad_row=p.on_bad_row,
        on_long_pair=p.on_long_pair,
    )
    loaded = load_pairs(paths, tokenizer, reading)
    if key == "files" and len(loaded.pairs) < p.num_pairs:
        raise ValueError(
            f"config.preference.num_pairs={p.num_pairs}, but {', '.join(paths)}: {loaded.report}. Set it to 0 for all."
        )
    return loaded


def _instructions(config: Config) -> Slot | None:
    p = config.preference
    if p.instructions is None:
        return None
    if not p.models:
        raise ValueError(
            "config.preference.instructions compares the scores of different models, and the policy is the only one; "
            "add some to config.preference.models, or set it to None."
        )
    slot = slots.resolve("instructions", p.instructions.to_dict())
    _try(slot, dict(scores=_shape(1, 2)))
    return slot


def _pairs(config: Config) -> Slot:
    p = config.preference
    if p.pairs is None:
        raise ValueError(
            "config.preference.pairs is None; set it to a rule such as call('air.pick', min_margin=2.0, max_margin=3.0, "
            "min_chosen_score=8.0, mix_policies=True), or config.preference.files to pairs of your own."
        )
    slot = slots.resolve("pairs", p.pairs.to_dict())
    table = dict(scores=_shape(1, 2), on_policy=_shape(1, 2, dtype=bool), response_id=_shape(1, 2, dtype=jnp.int32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    _try(slot, table | dict(keep=_shape(1, dtype=bool), key=key))
    return slot


def _shape(*shape: int, dtype: typing.Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _try(slot: Slot, offered: Mapping[str, typing.Any]) -> None:
    """Traces a slot, so that hyperparameters without meaning are refused now and not after minutes of sampling."""
    jax.eval_shape(lambda offered: slot(offered), {name: offered[name] for name in slot.wants})


def response_columns(config: Config, others: Sequence[str]) -> list[str]:
    """Who wrote each response to a prompt, by column."""
    p = config.preference
    return [POLICY] * p.num_samples + [name for name in others for _ in range(p.num_other_samples)]
