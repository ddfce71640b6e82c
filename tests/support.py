"""Tiny models, prompts and parts for tests: everything a loop needs, in shapes that compile in a second or two."""

import dataclasses
import functools
import importlib
import pathlib
import re
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments import config_files
from rl_reason import build, slots
from rl_reason.batch import BatchPlan
from rl_reason.loop.parts import Parts
from rl_reason.loop.waiting import PromptWidths
from rl_reason.models import transformer
from rl_reason.models.rope import RopeScaling
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig
from rl_reason.sharding import path_name
from rl_reason.types import Prompts, Rollout, Verdicts

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
VOCAB, PAD, EOS = 13, 0, 2
DEFAULT = base.get_config().model.to_dict()  # what tiny models are in all but size
PROMPT_WIDTH, COMPLETION_LEN = 5, 6


def config_names(loop: str | None = None) -> list[str]:
    """Every experiment in configs/, found rather than listed; or those of one kind of loop."""
    names = sorted(p.stem for p in CONFIGS.glob("*.py") if p.name not in config_files.HELPERS)
    return [name for name in names if loop is None or load_config(name).loop == loop]


def configs_whose_objective(*, asks: Sequence[str] = (), does_not_ask: Sequence[str] = ()) -> list[str]:
    """Those whose objective slot asks for all of ``asks`` and none of ``does_not_ask``."""
    wants = {
        name: slots.resolve("objective", load_config(name).objective.to_dict()).wants for name in config_names("rl")
    }
    return [name for name, names in wants.items() if names.issuperset(asks) and names.isdisjoint(does_not_ask)]


def one_of_each(names: Sequence[str], kind: Callable[[str], typing.Hashable]) -> list:
    """All names as parameters, those marked slow whose kind an earlier one has: every kind is tested always, all on
    request."""
    seen: set[typing.Hashable] = set()
    marked = []
    for name in names:
        known = kind(name) in seen
        seen.add(kind(name))
        marked.append(pytest.param(name, marks=[pytest.mark.slow] if known else []))
    return marked


@functools.cache
def way_between_phases(name: str) -> typing.Hashable:
    """What of a config passes between rollout, verdicts and update, and what the state holds besides the policy."""
    config = load_config(name)
    filled = slots.resolve_all(config.to_dict())
    reads = frozenset().union(*(fn.wants for slot in ("baseline", "reward") if (fn := filled[slot]) is not None))
    return config.loop, reads, bool(config.models), config.batch.demonstrations, config.batch.waiting_prompts > 0


def way_of_losing(name: str) -> typing.Hashable:
    """A config's objective, and how its terms are reduced."""
    config = load_config(name)
    terms = tuple((term, spec["how"], spec["over"]) for term, spec in config.aggregation.to_dict().items())
    return config.objective.fn, terms


def load_config(name: str, arg: str = "smoke"):
    """configs/<name>.py:<arg>."""
    return importlib.import_module(f"configs.{name}").get_config(arg)


def portable(implementations: typing.Iterable[str]) -> list[str]:
    """The implementations of an operation that every platform compiles: those that are no kernels for one kind of chip."""
    return [name for name in implementations if not name.startswith("pallas")]


def kernel_calls(text: str, kernel: str) -> int:
    """How often a lowered program calls custom calls with this word in them, in functions that it calls as well."""
    parts = [(re.match(r"\S+ @(\S+?)\(", part), part) for part in text.split("func.func ")]
    functions = {found[1]: part for found, part in parts if found}

    @functools.cache
    def count(name: str) -> int:
        called = re.findall(r"call @(\S+?)\(", functions[name])
        return functions[name].count(kernel) + sum(count(other) for other in called if other in functions)

    return count("main")


def one_device() -> list:
    """For ``build.build(config, devices)``, where a test wants no sharding."""
    return jax.devices()[:1]


def tiny_model(**changes: typing.Any) -> ModelConfig:
    """Two layers, grouped-query attention, 13 tokens; ``num_experts=4, experts_per_token=2`` makes it a mixture."""
    sizes = dict(vocab_size=VOCAB, num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=12)
    return dataclasses.replace(ModelConfig.of(DEFAULT | sizes), **changes)


MOE: dict[str, typing.Any] = dict(num_experts=4, experts_per_token=2)
# All that parts Gemma 2 and 3 from Qwen3, and a bias: the second layer sees all, the first three tokens.
GEMMA: dict[str, typing.Any] = dict(
    activation="gelu_tanh",
    qkv_bias=True,
    post_norms=True,
    norm_plus_one=True,
    query_scale=0.4,
    attention_soft_cap=2.0,
    final_soft_cap=3.0,
    rope_scaling=RopeScaling("linear", 4.0),
    rope_theta_local=100.0,
    window=3,
    full_every=2,
)
# GLM-4 of 0414: half of a head turns.
GLM: dict[str, typing.Any] = dict(qkv_bias=True, qk_norm=False, post_norms=True, rotary_dim=2)
FLOAT64: dict[str, typing.Any] = dict(dtype="float64", param_dtype="float64")  # under jax.enable_x64(True)


def tiny_params(model: ModelConfig, seed: int = 0, scale: float = 2.0):
    """Random parameters by numpy, the same on every jax; a larger ``scale`` of embeddings makes tokens differ more."""
    rng = np.random.default_rng(seed)
    shapes = transformer.param_shapes(model)

    def fill(path, leaf):
        name = path_name(path)
        x = 1 + 0.1 * rng.normal(size=leaf.shape) if "norm" in name else rng.normal(size=leaf.shape)
        fan_in = {"norm": 1, "down": model.mlp_size, "out": model.num_heads * model.head_dim}
        width = next((n for word, n in fan_in.items() if word in name), model.hidden_size)
        return jnp.asarray(x * width**-0.5 * (scale if "embed" in name else 1.0), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def tiny_prompts(batch: int = 4, seed: int = 0, width: int = PROMPT_WIDTH, vocab: int = VOCAB) -> Prompts:
    """Random prompts of 1 to ``width`` tokens that hold neither padding nor EOS, with a demonstration of up to three
    tokens and EOS, and a reference of two; uid = row."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, width + 1, batch)
    tokens = np.where(np.arange(width) < length[:, None], rng.integers(EOS + 1, vocab, (batch, width)), PAD)
    index = jnp.arange(batch, dtype=jnp.int32)
    shown = np.where(np.arange(4) < rng.integers(1, 4, (batch, 1)), rng.integers(EOS + 1, vocab, (batch, 4)), EOS)
    shown[:, 1:] *= shown[:, :-1] != EOS  # padding after the first EOS
    return Prompts(
        tokens=jnp.asarray(tokens, jnp.int32),
        prompt_len=jnp.asarray(length, jnp.int32),
        example_id=index,
        uid=index,
        route=jnp.zeros_like(index),
        reference=jnp.asarray(rng.integers(EOS + 1, vocab, (batch, 2)), jnp.int32),
        demonstration=jnp.asarray(shown, jnp.int32),
    )


def prompts_like(parts: Parts, leading: tuple[int, ...] = ()) -> Prompts:
    """What the stream of a run gives, as zeros."""
    shape, widths = (*leading, parts.plan.prompts_drawn), parts.prompt_widths
    of = lambda *own: jnp.zeros((*shape, *own), jnp.int32)
    optional = lambda width: None if width is None else of(width)
    reference, demonstration = optional(widths.reference), optional(widths.demonstration)
    return Prompts(of(widths.prompt), of(), of(), of(), of(), reference, demonstration)


def tiny_rollout(**changes: typing.Any) -> RolloutConfig:
    """Groups of two, six tokens, four slots: fewer slots than rows, so that refills happen."""
    rollout = RolloutConfig(
        group_size=2,
        completion_len=COMPLETION_LEN,
        num_slots=4,
        check_every=2,
        prefill_rows=0,
        eos_id=EOS,
        pad_id=PAD,
    )
    return dataclasses.replace(rollout, **changes)


def tiny_parts(
    config: typing.Any = "base",
    model: typing.Mapping[str, typing.Any] | None = None,
    rollout: typing.Mapping[str, typing.Any] | None = None,
    **plan: typing.Any,
) -> Parts:
    """The parts of a config (by name, or one at hand), its slots and losses untouched, around a tiny model.

    By default 4 prompts a step in groups of 2, the config's minibatches (at most 4) and one microbatch; ``plan``
    changes any field of BatchPlan. The step's prompts are then ``tiny_prompts(4)``.
    """
    config = load_config(config) if isinstance(config, str) else config
    parts = build.build(config, one_device()).parts
    sizes = dataclasses.asdict(parts.plan) | dict(
        prompts_per_step=4,
        group_size=2,
        train_group_size=2,
        generated_prompts=4,
        max_rounds=1,
        microbatch_rows=0,
        waiting_prompts=0,
    )
    plan = BatchPlan(**sizes | plan)
    shapes = dict(group_size=plan.num_samples, num_shards=plan.row_shards)
    tiny, token_reward = tiny_model(**model or {}), parts.token_reward
    return dataclasses.replace(
        parts,
        model=tiny,
        token_reward=None if token_reward is None else dataclasses.replace(token_reward, model=tiny),
        rollout=tiny_rollout(**shapes | dict(rollout or {})),
        plan=plan,
        prompt_widths=PromptWidths(PROMPT_WIDTH, reference=2, demonstration=4),  # tiny_prompts'
    )


def parity_verify(rollout: Rollout, prompts: Prompts) -> Verdicts:
    """A verifier in graph: right when the completion's tokens sum to an even number, and the answer is the sum's last
    digit. Always valid."""
    del prompts
    total = jnp.where(rollout.completion_mask, rollout.tokens, 0).sum(1)
    score = (total % 2 == 0).astype(rollout.rollout_logprobs.dtype)
    return Verdicts(score, jnp.ones_like(rollout.truncated), (total % 10).astype(jnp.int32))
