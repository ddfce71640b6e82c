"""From a config to everything a run is made of, with all of it checked before anything compiles."""

import dataclasses
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from configs.common import Config
from rl_reason import aggregation, members, sharding, slots
from rl_reason import rollout as rollout_lib
from rl_reason.batch import BatchPlan
from rl_reason.data.sources import Source, make_source
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.loop import cohort, token_reward
from rl_reason.loop.parts import Parts
from rl_reason.loop.token_reward import TokenReward
from rl_reason.models import transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig
from rl_reason.sampling import Sampling, make_sampling
from rl_reason.tasks.answer_ids import RULES
from rl_reason.tasks.in_graph import make_verifier
from rl_reason.types import TrainState
from rl_reason.verifier_pool import check_verifier

TOKEN_REWARD_KEY = 0x70  # keeps its random head apart from everything else drawn from the root
LOOPS = ("rl", "supervised", "cohort")
VERIFY = ("graph", "callback", "split", "overlapped")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what it describes. Nothing here holds an array."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    train: Source
    heldout: Source  # what is evaluated: ``config.evaluation.split``
    parts: Parts
    supervised: Parts  # the same model with the warm-up's optimizer
    policies: Mapping[str, "Experiment"]  # of a cohort, each as if it trained alone; {} elsewhere

    @property
    def sampling(self) -> Sampling:
        """The rollout's knobs, as traced arrays."""
        r = self.config.rollout
        return make_sampling(r.temperature, r.top_k, r.top_p, r.min_p)

    @property
    def answer_rule(self) -> str | None:
        """How answers are read where votes are taken; None where nobody asks for them."""
        return self.config.answer_rule if self.parts.wants("answers") else None

    @property
    def total_chunks(self) -> int:
        return self.config.num_steps // self.config.steps_per_call


def build(config: Config, devices: list | None = None) -> Experiment:
    """Checks a config and builds what it names.

    Raises:
        ValueError: whatever is wrong with it, naming the key and the cure.
    """
    _check_run(config)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    tokenizer = Tokenizer.load() if config.tokenizer == "embedded" else Tokenizer.load(config.tokenizer)
    train = make_source_of(config, tokenizer, "train")
    heldout = make_source_of(config, tokenizer, config.evaluation.split)
    for name in train.verifiers:
        check_verifier(name)
    if config.verify == "graph":
        if config.data.tasks:
            make_verifier(train.names, tokenizer)  # refuses tasks without one, by name
        else:
            raise ValueError("config.verify='graph' needs tasks; use 'callback', 'split' or 'overlapped' with files.")
    model = model_config(config, tokenizer)
    plan = BatchPlan(**config.batch, row_shards=sharding.num_row_shards(mesh))
    rollout = rollout_config(config, tokenizer, mesh, plan.num_samples, config.rollout.num_slots)
    rollout_lib.check(rollout, plan.generated_prompts)
    if config.verify == "overlapped" and plan.max_rounds > 1:
        raise ValueError(
            "config.verify='overlapped' draws one round ahead; set config.batch.max_rounds=1, or 'split'."
        )
    if config.rollout.temperature <= 0:
        raise ValueError("config.rollout.temperature must be above 0 for training: a greedy policy has no gradient.")
    make_sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p, config.rollout.min_p)
    _check_regularisers(config.regularisers.to_dict())
    reduced = config.aggregation.to_dict()
    aggregation.check(reduced)
    o = config.optimizer.to_dict()
    schedule = rl_schedule(o, config.num_steps * plan.updates_per_step)
    parts = Parts(
        model=model,
        rollout=rollout,
        plan=plan,
        slots=_slots(config),
        optimizer=adamw(o, schedule),
        schedule=schedule,
        aggregation=reduced,
        regularisers=config.regularisers.to_dict(),
        router_coefs=dict(balance=config.router.balance_coef, z=config.router.z_coef),
        objective_scope=config.objective_scope,
        token_reward=_token_reward(config, model),
        tokenizer=tokenizer,
        log_groups=config.log.rollout_groups,
    )
    w = config.warmup
    warm_schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        w.learning_rate,
        max(w.lr_warmup_steps, 1),
        max(w.num_steps, w.lr_warmup_steps + 1, 2),
        0.1 * w.learning_rate,
    )
    supervised = dataclasses.replace(
        parts, optimizer=adamw({**o, "weight_decay": w.weight_decay}, warm_schedule), schedule=warm_schedule
    )
    policies = {name: build(own, devices) for name, own in members.configs(config).items()}
    if policies:
        members.check_vote(config, parts.slots["reward"], len(policies), plan.group_size)
        cohort.check({name: policy.parts for name, policy in policies.items()})
    return Experiment(config, mesh, tokenizer, train, heldout, parts, supervised, policies)


def _check_run(config: Config) -> None:
    if config.loop not in LOOPS:
        raise ValueError(f"config.loop={config.loop!r}; there are {', '.join(LOOPS)}.")
    if config.verify not in VERIFY:
        raise ValueError(f"config.verify={config.verify!r}; there are {', '.join(VERIFY)}.")
    if config.answer_rule not in RULES:
        raise ValueError(f"config.answer_rule={config.answer_rule!r}; there are {', '.join(RULES)}.")
    if config.evaluation.split not in ("heldout", "train"):
        raise ValueError(f"config.evaluation.split={config.evaluation.split!r}; there are heldout, train.")
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
    if config.warmup.num_steps % max(config.warmup.steps_per_call, 1):
        raise ValueError(
            f"config.warmup.num_steps={config.warmup.num_steps} is no multiple of "
            f"warmup.steps_per_call={config.warmup.steps_per_call}."
        )


def _slots(config: Config) -> dict[str, slots.Slot | None]:
    """The slots; overlapped rollouts are one step off-policy and always corrected."""
    found = slots.resolve_all(config.to_dict())
    if config.verify == "overlapped" and found["correction"] is None:
        if config.overlap_correction is None:
            raise ValueError("config.verify='overlapped' is off-policy: set config.correction or overlap_correction.")
        found["correction"] = slots.resolve("correction", config.overlap_correction.to_dict())
    return found


def _check_regularisers(regularisers: Mapping[str, typing.Any]) -> None:
    wanted = {"kl": {"estimator", "coef", "how", "divisor"}, "entropy": {"coef", "how", "divisor"}}
    for name, keys in regularisers.items():
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
    kl = regularisers["kl"]
    if kl is not None and kl["estimator"] not in ("k1", "k2", "k3"):
        raise ValueError(f"config.regularisers.kl.estimator={kl['estimator']!r}; there are k1, k2, k3.")


def make_source_of(config: Config, tokenizer: Tokenizer, split: str) -> Source:
    """The config's training or held-out data."""
    data = config.data.to_dict()
    for key in ("max_demonstration_len_tokens", "max_reference_len_tokens"):
        data.pop(key)
    return make_source(seed=config.seed, split=split, encode=tokenizer.encode, **data)


def model_config(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The model's shapes, with the tokenizer's vocabulary."""
    return ModelConfig(vocab_size=tokenizer.vocab_size, **config.model)


def rollout_config(config: Config, tokenizer: Tokenizer, mesh: Mesh, group_size: int, num_slots: int) -> RolloutConfig:
    """The sampler's static side."""
    r = config.rollout
    return RolloutConfig(
        group_size=group_size,
        completion_len=r.completion_len,
        num_slots=num_slots,
        check_every=r.check_every,
        prefill_rows=r.prefill_rows,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        stop_sequences=tuple(tuple(tokenizer.encode(text)) for text in r.stop),
        num_shards=sharding.num_row_shards(mesh),
    )


def rl_schedule(o: Mapping[str, typing.Any], total_updates: int) -> Callable:
    """A rate of 0 while frozen, linear warm-up, then constant, cosine or linear decay to 0 over the run's updates."""
    frozen = o["frozen_updates"]
    if frozen:
        later = rl_schedule({**o, "frozen_updates": 0}, total_updates - frozen)
        return optax.join_schedules([optax.constant_schedule(0.0), later], [frozen])
    warm = min(o["lr_warmup_updates"], max(total_updates - 1, 0))
    rate, rest = o["learning_rate"], max(total_updates - warm, 1)
    decays = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest),
        "linear": optax.linear_schedule(rate, 0.0, rest),
    }
    if o["lr_decay"] not in decays:
        raise ValueError(f"config.optimizer.lr_decay={o['lr_decay']!r}; there are {', '.join(decays)}.")
    if warm == 0:
        return decays[o["lr_decay"]]
    return optax.join_schedules([optax.linear_schedule(rate / warm, rate, warm), decays[o["lr_decay"]]], [warm])


def adamw(o: Mapping[str, typing.Any], schedule: Callable) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; decay spares norms and biases (one-dimensional per layer)."""

    def decays(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in sharding.path_name(path), params)

    return optax.chain(
        optax.clip_by_global_norm(o["grad_clip"]),
        optax.adamw(schedule, b1=o["b1"], b2=o["b2"], eps=o["eps"], weight_decay=o["weight_decay"], mask=decays),
    )


def new_state(parts: Parts, params: PyTree, seed: int) -> TrainState:
    """A state at step 0 around given parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=parts.optimizer.init(params),
        key=jax.random.key(seed),
        ref_params=jax.tree.map(jnp.copy, params) if parts.needs_reference else None,
        models={}
        if parts.token_reward is None
        else {token_reward.NAME: _new_token_reward(parts.token_reward, params, seed)},
        stats=_stats(parts),
    )


def _new_token_reward(static: TokenReward, params: PyTree, seed: int) -> dict[str, PyTree]:
    return static.init(jax.random.fold_in(jax.random.key(seed), TOKEN_REWARD_KEY), params)


def _token_reward(config: Config, model: ModelConfig) -> TokenReward | None:
    """The model that ``config.token_reward`` describes; AdamW as the policy's, at its own rate."""
    if config.token_reward is None:
        return None
    own = dict(config.token_reward)
    if set(own) != {"learning_rate"}:
        raise ValueError(f"config.token_reward has keys {sorted(own)}; it takes exactly learning_rate.")
    o = config.optimizer.to_dict()
    return TokenReward(model, adamw(o, optax.constant_schedule(own["learning_rate"])))


def _stats(parts: Parts) -> dict[str, typing.Any]:
    """Counters of updates, and what slots keep between steps."""
    stats = {name: jnp.zeros((), jnp.int32) for name in ("skipped_updates", "skipped_in_a_row", "updates")}
    for slot in parts.slots.values():
        stats |= slot.initial_stats() if slot is not None else {}
    return stats


def state_shardings(parts: Parts, mesh: Mesh) -> TrainState:
    """Where each part of the state lives: parameters by the table, moments and references like them, the rest everywhere."""
    params = jax.eval_shape(lambda key: transformer.init(key, parts.model), jax.random.key(0))
    state = jax.eval_shape(lambda params: new_state(parts, params, 0), params)
    return sharding.like_params(state, params, mesh)


def init_params(experiment: Experiment) -> PyTree:
    """Random parameters, born sharded; the same whatever the mesh."""
    parts, mesh = experiment.parts, experiment.mesh
    init = lambda key: transformer.init(key, parts.model)
    key = jax.random.key(experiment.config.seed)
    shapes = jax.eval_shape(init, key)
    return jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))(key)


def init_state(experiment: Experiment, parts: Parts, params: PyTree) -> TrainState:
    """A sharded state at step 0; ``params`` is copied, so the state may be donated."""
    make = lambda params: new_state(parts, jax.tree.map(jnp.copy, params), experiment.config.seed)
    return jax.jit(make, out_shardings=state_shardings(parts, experiment.mesh))(params)


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp, after ``leading`` uncut axes."""
    return NamedSharding(mesh, P(*(None,) * leading, sharding.ROWS))
