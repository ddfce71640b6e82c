"""The words of the codebase: what prompts, rollouts, rewards and the training state are made of.

B prompts, G completions a prompt, N = B * G rows, P prompt width, C completion width, T = P + C.
"""

import dataclasses
import typing
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

S = typing.TypeVar("S")


@typing.dataclass_transform(frozen_default=True)
def struct(cls: type[S]) -> type[S]:
    """A frozen dataclass that is a pytree.

    Unflattening skips ``__init__``, so JAX may put tracers, shardings or ``None`` where arrays are declared while
    constructing one by hand is still shape-checked under pytest.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def unflatten(_, leaves):
        new = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(new, name, leaf)
        return new

    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda s: ([(key, getattr(s, name)) for key, name in zip(keys, names, strict=True)], None),
        unflatten,
        lambda s: ([getattr(s, name) for name in names], None),
    )
    return cls


def on_host(cls: type[S], **arrays: typing.Any) -> S:
    """A struct around numpy arrays that are not on a device yet; what is not given is the field's default.

    Past ``__init__``, because that declares device arrays, and because arrays of one process are not the global ones.
    """
    new = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = arrays.pop(field.name, field.default)
        assert value is not dataclasses.MISSING, field.name
        object.__setattr__(new, field.name, value)
    assert not arrays, list(arrays)
    return new


@struct
class Prompts:
    """A batch of prompts; position = column."""

    tokens: Int[Array, "*K B P"]  # from column 0, right-padded
    prompt_len: Int[Array, "*K B"]  # tokens, at least 1
    example_id: Int[Array, "*K B"]  # row of its source
    uid: Int[Array, "*K B"]  # global draw number: an example drawn twice has two
    route: Int[Array, "*K B"] | None = None  # which of the source's tasks
    reference: Int[Array, "*K B R"] | None = None  # oracle answer, right-padded with pad
    demonstration: Int[Array, "*K B D"] | None = None  # worked solution, EOS included, right-padded with pad
    baseline: Float[Array, "*K B"] | None = None
    redraws: Int[Array, "*K B"] | None = None  # how often it was drawn before: each time has samples of its own


@struct
class Rollout:
    """Completions; a row is prompt, completion, padding without gaps."""

    tokens: Int[Array, "N T"]
    prompt_len: Int[Array, " N"]
    completion_mask: Bool[Array, "N T"]  # True = trained on; the first EOS is included
    rollout_logprobs: Float[Array, "N T"]  # sampler, full vocabulary, at its temperature; nats, 0 off the mask
    sampled_logprobs: Float[Array, "N T"]  # of the distribution drawn from, after top-k / top-p / min-p
    prompt_id: Int[Array, " N"]  # row of the batch's prompts
    truncated: Bool[Array, " N"]  # hit its token limit before a stop
    off_policy: Bool[Array, " N"]  # a demonstration, not a sample
    reference_mask: Bool[Array, "N T"] | None = None
    expert_ids: Int[Array, "N LK T"] | None = (
        None  # the K experts that each of L layers chose for each token fed; -1: not recorded
    )


@struct
class Verdicts:
    """What verifiers said of each row: a score in [0, 1], and whether they could say anything at all.

    ``answers`` are for votes: rows of one prompt whose answers are the same have the same number, -1 is no answer.
    """

    score: Float[Array, " N"]
    valid: Bool[Array, " N"]
    answers: Int[Array, " N"] | None = None


@struct
class Rewards:
    """What the reward slot returns, one entry a row."""

    total: Float[Array, " N"]
    correct: Float[Array, " N"]  # the unshaped verdict: filters and success rates read this one
    valid: Bool[Array, " N"]  # False: the verifier itself failed; the sample teaches nothing
    parts: dict[str, Float[Array, " N"]] = dataclasses.field(default_factory=dict)
    token_rewards: Float[Array, "N T"] | None = None
    sampled_mean: Float[Array, " N"] | None = (
        None  # of the rewards of all valid samples of the prompt, the loop's to fill
    )
    sampled_count: Float[Array, " N"] | None = None  # how many those are; selection changes neither


@struct
class TrainState:
    """Everything a step changes, and the root key, which it does not."""

    step: Int[Array, ""]
    params: PyTree[Array]
    opt_state: PyTree
    key: Key[Array, ""]  # the root: never split, only folded into
    ref_params: PyTree[Array] | None = None
    models: dict[str, PyTree] = dataclasses.field(default_factory=dict)  # judges, reward models, a cohort
    stats: dict[str, PyTree] = dataclasses.field(default_factory=dict)  # running statistics


Metrics = dict[str, Float[Array, ""]]
Verify = Callable[[Rollout, Prompts], Verdicts]  # runs inside the program
