"""Turns ``call("clip_cov.objective", ...)`` of a config into a bound function that is given what it asks for by name.

Positional parameters name arrays that the loop offers; asking is the switch. Keyword-only parameters are hyperparameters:
none has a default in code, and the config supplies exactly those. A function ``f`` with running statistics has a neighbour
``f_stats()`` that makes them.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping

import rl_reason.methods

_ADVANTAGES = """rewards correct valid keep off_policy sampled_mean sampled_count completion_mask old_logprobs ref_logprobs
token_rewards"""
_OBJECTIVE = """logprobs old_logprobs ref_logprobs rollout_logprobs entropy advantages completion_mask reference_mask
token_scores rewards correct success_rate off_policy key"""
_REWARD = "score valid answers rollout prompts params ref_params models stats key tokenizer score_logprobs judges"
_PAIR_OBJECTIVE = """chosen_logprobs rejected_logprobs ref_chosen_logprobs ref_rejected_logprobs chosen_len
rejected_len"""
_NAMES = {
    "baseline": "prompts rollout ref_params tokenizer score_logprobs",
    "reward": _REWARD,
    "selection": "rewards correct valid stats step key",
    "advantages": _ADVANTAGES,
    "correction": "old_logprobs rollout_logprobs off_policy completion_mask",
    "objective": _OBJECTIVE,
    "pair_objective": _PAIR_OBJECTIVE,
    "instructions": "scores",
    "pairs": "scores on_policy response_id keep key",
}
OFFERED: dict[str, frozenset[str]] = {slot: frozenset(names.split()) for slot, names in _NAMES.items()}
OPTIONAL = frozenset({"baseline", "selection", "correction"})  # slots that a config may leave None
# Slots of the preference loop alone, and the key of each.
PREFERENCE = {
    "pair_objective": "preference.objective",
    "instructions": "preference.instructions",
    "pairs": "preference.pairs",
}


class Slot(typing.NamedTuple):
    """A function with its hyperparameters bound, the names of the arrays it wants, and what makes its statistics."""

    fn: Callable
    wants: frozenset[str]
    initial_stats: Callable[[], dict] = dict  # running statistics at step 0, for ``TrainState.stats``

    def __call__(self, offered: Mapping[str, typing.Any]):
        return self.fn(**{name: offered[name] for name in self.wants})


def did_you_mean(name: str, known) -> str:
    """' Did you mean ...?', or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _find(slot: str, path: str) -> Callable:
    module, _, name = path.partition(".")
    key = PREFERENCE.get(slot, slot)
    modules = [m.name for m in pkgutil.iter_modules(rl_reason.methods.__path__)]
    if module not in modules:
        raise ValueError(
            f"config.{key}.fn={path!r}: no module rl_reason/methods/{module}.py.{did_you_mean(module, modules)} "
            f"There are: {', '.join(modules)}."
        )
    found = importlib.import_module(f"rl_reason.methods.{module}")
    functions = [n for n, f in vars(found).items() if inspect.isfunction(f) and f.__module__ == found.__name__]
    if name not in functions:
        raise ValueError(
            f"config.{key}.fn={path!r}: {module} has no function {name!r}.{did_you_mean(name, functions)} "
            f"It has: {', '.join(functions)}."
        )
    return getattr(found, name)


def resolve(slot: str, cfg: Mapping[str, typing.Any]) -> Slot:
    """Finds a slot's function in rl_reason.methods and binds its hyperparameters.

    Raises:
        ValueError: an unknown function, hyperparameters missing or unknown, or arrays that the slot does not offer.
    """
    fn = _find(slot, cfg["fn"])
    given = {k: v for k, v in cfg.items() if k != "fn"}
    parameters = inspect.signature(fn).parameters.values()
    wants = frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    hypers = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    missing, unknown = sorted(hypers - set(given)), sorted(set(given) - hypers)
    if missing or unknown:
        hints = "".join(did_you_mean(name, hypers) for name in unknown)
        raise ValueError(
            f"config.{PREFERENCE.get(slot, slot)} = call({cfg['fn']!r}, ...): missing {missing}, unknown {unknown}.{hints} "
            f"Hyperparameters have no defaults in code; {cfg['fn']} takes exactly {sorted(hypers)}."
        )
    if foreign := sorted(wants - OFFERED[slot]):
        raise ValueError(
            f"{cfg['fn']} asks for {foreign}; the {slot} slot offers {sorted(OFFERED[slot])}. "
            "Make hyperparameters keyword-only."
        )
    return Slot(
        functools.partial(fn, **given), wants, getattr(sys.modules[fn.__module__], f"{fn.__name__}_stats", dict)
    )


def resolve_all(config: Mapping[str, typing.Any]) -> dict[str, Slot | None]:
    """Every slot of an RL config; optional ones may be None.

    Raises:
        ValueError: from ``resolve``, or a required slot that is None.
    """
    slots: dict[str, Slot | None] = {}
    for slot in (name for name in OFFERED if name not in PREFERENCE):
        cfg = config[slot]
        if cfg is None and slot not in OPTIONAL:
            raise ValueError(f"config.{slot} is None; only {sorted(OPTIONAL)} may be left out.")
        slots[slot] = None if cfg is None else resolve(slot, cfg)
    return slots
