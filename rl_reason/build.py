"""From a config to everything a run is made of, with all of it checked before anything compiles."""

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key, PyTree

from configs.common import Config
from rl_reason import aggregation, checks, judging, learning, members, sharding, slots
from rl_reason import rollout as rollout_lib
from rl_reason.batch import BatchPlan
from rl_reason.data import tokenizer as tokenizers
from rl_reason.data.chat import ChatSettings
from rl_reason.data.schema import TEMPLATE
from rl_reason.data.sources import Source, make_source
from rl_reason.data.tokenizer import Tokenizer
from rl_reason.loop import cohort, pair_parts, token_reward, waiting
from rl_reason.loop.optimizer import init_optimizer
from rl_reason.loop.pair_parts import PairParts
from rl_reason.loop.partition import split
from rl_reason.loop.parts import Parts
from rl_reason.loop.token_reward import TokenReward
from rl_reason.loop.waiting import PromptWidths
from rl_reason.models import lora, transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig
from rl_reason.sampling import Sampling, make_sampling
from rl_reason.tasks.in_graph import make_verifier
from rl_reason.types import TrainState
from rl_reason.verifier_pool import check_verifier

NOT_OF_SOURCES = (  # keys of config.data that say how examples are made into tokens
    "max_demonstration_len_tokens",
    "max_reference_len_tokens",
    "references",
    "train_split",
    "system_prompt",
    "template_variables",
)
# Keep what they draw apart from everything else drawn from the root.
TOKEN_REWARD_KEY, JUDGES_KEY, LORA_KEY = 0x70, 0x71, 0x72


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and what it describes. Nothing here holds an array."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    train: Source
    heldout: Source
    parts: Parts
    supervised: Parts  # the same model with the warm-up's optimizer
    pairs: PairParts | None = None  # of the preference loop
    others: Mapping[str, "Experiment"] = dataclasses.field(
        default_factory=dict
    )  # models that answer beside the policy
    policies: Mapping[str, "Experiment"] = dataclasses.field(
        default_factory=dict
    )  # of a cohort, each as if it were alone

    @property
    def sampling(self) -> Sampling:
        """The rollout's knobs, as traced arrays."""
        r = self.config.rollout
        return make_sampling(r.temperature, r.top_k, r.top_p, r.min_p)

    @property
    def answer_rule(self) -> str | None:
        """How answers are read where votes are taken; None where nobody asks for them."""
        return self.config.answer_rule if self.parts.wants("answers") else None

    def describe(self) -> str:
        """What a step learns from, on one line."""
        s, p = self.config.supervised, self.config.preference
        return {
            "rl": self.parts.plan.describe(),
            "cohort": f"each of {', '.join(self.policies)}: {self.parts.plan.describe()}",
            "supervised": f"{s.rows_per_step} rows of {s.row_len_tokens} tokens a step",
            "preference": f"{p.pairs_per_step} pairs a step in {p.microbatches} microbatches",
        }[self.config.loop]

    @property
    def total_chunks(self) -> int:
        return self.config.num_steps // self.config.steps_per_call


def build(config: Config, devices: list | None = None) -> Experiment:
    """Checks a config and builds what it names.

    Raises:
        ValueError: whatever is wrong with it, naming the key and the cure.
    """
    checks.run(config)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    tokenizer = load_tokenizer(config)
    pairs, others = None, {}
    if config.loop == "preference":
        pairs = pair_parts.from_config(config, tokenizer, sharding.num_row_shards(mesh))
        others = {name: build(other, devices) for name, other in pair_parts.other_configs(config).items()}
        for name, other in others.items():
            checks.vocabulary(other.config, name, tokenizer)
    train = make_source_of(config, tokenizer, config.data.train_split, config.data.num_examples)
    heldout = make_source_of(config, tokenizer, "heldout")
    for name in train.verifiers:
        check_verifier(name)
    if config.verify == "graph":
        if config.data.tasks:
            make_verifier(train.names, tokenizer)  # refuses tasks without one, by name
            checks.witnesses(config, tokenizer, train)
        else:
            raise ValueError("config.verify='graph' needs tasks; use 'callback', 'split' or 'overlapped' with files.")
    checks.examples(config, train)
    warm = [] if config.data.files else [warmup_source(config, tokenizer)]
    checks.lengths(config, tokenizer, [train, heldout, *warm])
    model = model_config(config, tokenizer)
    checks.positions(config, model)
    plan = BatchPlan(**config.batch, row_shards=sharding.num_row_shards(mesh))
    rollout = rollout_config(config, tokenizer, mesh, plan.num_samples, config.rollout.num_slots)
    rollout = dataclasses.replace(rollout, record_experts=_replays(config, plan))
    adapters, frozen = learning.adapters(config.lora.to_dict(), model), learning.frozen(config.optimizer.frozen, model)
    rollout_lib.check(rollout, plan.generated_prompts)
    if config.verify == "overlapped" and plan.in_rounds:
        raise ValueError(
            "config.verify='overlapped' draws one round ahead; set config.batch.max_rounds=1 and waiting_prompts=0, or "
            "'split'."
        )
    if config.rollout.temperature <= 0:
        raise ValueError("config.rollout.temperature must be above 0 for training: a greedy policy has no gradient.")
    make_sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p, config.rollout.min_p)
    checks.regularisers(config.regularisers.to_dict())
    reduced = config.aggregation.to_dict()
    aggregation.check(reduced)
    o = config.optimizer.to_dict()
    schedule = learning.rl_schedule(o, config.num_steps * (plan.updates_per_step if config.loop == "rl" else 1))
    judges = judging.described(config.to_dict()["models"] or {}, model, train.names, tokenizer)
    parts = Parts(
        model=model,
        rollout=rollout,
        plan=plan,
        prompt_widths=_prompt_widths(config, plan, judges),
        slots=_slots(config),
        optimizer=learning.adamw(o, schedule),
        schedule=schedule,
        frozen=frozen if adapters is None else lora.FROZEN,
        lora=adapters,
        skip_above_norm=o["skip_above_norm"],
        aggregation=reduced,
        regularisers=config.regularisers.to_dict(),
        router_coefs=dict(balance=config.router.balance_coef, z=config.router.z_coef),
        objective_scope=config.objective_scope,
        token_reward=_token_reward(config, model),
        judges=judges,
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
        parts,
        optimizer=learning.adamw({**o, "weight_decay": w.weight_decay}, warm_schedule),
        schedule=warm_schedule,
        frozen=(),
        lora=None,
        skip_above_norm=0.0,
    )
    policies = {name: build(own, devices) for name, own in members.configs(config).items()}
    if policies:
        members.check_vote(config, parts.slots["reward"], len(policies), plan.group_size)
        cohort.check({name: policy.parts for name, policy in policies.items()})
    if parts.wants("answers"):
        checks.answers(config)
    return Experiment(config, mesh, tokenizer, train, heldout, parts, supervised, pairs, others, policies)


def _slots(config: Config) -> dict[str, slots.Slot | None]:
    """The slots; overlapped rollouts are one step off-policy and always corrected."""
    found = slots.resolve_all(config.to_dict())
    if config.verify == "overlapped" and found["correction"] is None:
        if config.overlap_correction is None:
            raise ValueError("config.verify='overlapped' is off-policy: set config.correction or overlap_correction.")
        found["correction"] = slots.resolve("correction", config.overlap_correction.to_dict())
    return found


def _prompt_widths(config: Config, plan: BatchPlan, judges: Mapping[str, judging.Judge]) -> PromptWidths:
    """What the prompts of RL hold: references where something reads them, demonstrations where groups have some."""
    data = config.data
    references = config.verify == "graph" or data.references or bool(judges)
    return PromptWidths(
        data.max_prompt_len_tokens,
        data.max_reference_len_tokens if references else None,
        data.max_demonstration_len_tokens if plan.demonstrations else None,
    )


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the config names; its prompts are chats where ``config.data.chat`` is 'template'.

    Raises:
        ValueError: when there is none that can be read, or no template.
    """
    data, chat = config.data, None
    if data.chat == TEMPLATE:
        chat = ChatSettings(data.system_prompt, dict(data.template_variables or {}))
    elif data.system_prompt or data.template_variables:
        raise ValueError("config.data.system_prompt and template_variables go with config.data.chat='template'.")
    try:
        return tokenizers.load(config.tokenizer, chat)
    except ValueError as error:
        raise ValueError(f"config.tokenizer={config.tokenizer!r}: {error}") from error


def make_source_of(config: Config, tokenizer: Tokenizer, split: str, num_examples: int = 0) -> Source:
    """The config's data of a split; of tasks the first ``num_examples``, or with 0 an endless supply."""
    data = config.data.to_dict() | dict(num_examples=num_examples)
    for key in NOT_OF_SOURCES:
        data.pop(key)
    return make_source(seed=config.seed, split=split, prompt_ids=tokenizer.prompt, **data)


def warmup_source(config: Config, tokenizer: Tokenizer) -> Source:
    """Where the warm-up's worked solutions come from: the data's own tasks or files, or tasks that ``config.warmup`` names.

    Never held-out problems, and never just the few that RL may be bounded to.
    """
    w = config.warmup
    if not w.tasks:
        if w.levels:
            raise ValueError("config.warmup.levels goes with config.warmup.tasks; name those too.")
        return make_source_of(config, tokenizer, "train")
    return make_source(seed=config.seed, split="train", tasks=w.tasks, levels=w.levels)


def model_config(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The model's shapes; its vocabulary is the tokenizer's, or that padded to a checkpoint's.

    Raises:
        ValueError: for a vocabulary that lacks some of the tokenizer's ids.
    """
    shapes = dict(config.model)
    vocab_size = shapes.pop("vocab_size") or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"config.model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} ids of "
            f"config.tokenizer={config.tokenizer!r}; 0 takes the tokenizer's."
        )
    return ModelConfig.of(dict(shapes, vocab_size=vocab_size))


def rollout_config(config: Config, tokenizer: Tokenizer, mesh: Mesh, group_size: int, num_slots: int) -> RolloutConfig:
    """The sampler's static side."""
    r, specials = config.rollout, tokenizer.special_ids
    if "" in r.stop:
        raise ValueError(f"config.rollout.stop={r.stop!r}: an empty text would end every completion; leave it out.")
    texts = tuple(text for text in r.stop if text not in specials)
    named = (specials[text] for text in r.stop if text in specials)
    return RolloutConfig(
        group_size=group_size,
        completion_len=r.completion_len,
        num_slots=num_slots,
        check_every=r.check_every,
        prefill_rows=r.prefill_rows,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        stop_ids=(*(token for token in tokenizer.stop_ids if token != tokenizer.eos_id), *named),
        stop=texts,
        piece_bytes=tokenizer.piece_bytes if texts else (),
        num_shards=sharding.num_row_shards(mesh),
        merge_adapters=config.lora.merge_to_sample,
        layout=r.layout,
    )


def _replays(config: Config, plan: BatchPlan) -> bool:
    """Whether updates use the experts chosen at rollout.

    Raises:
        ValueError: nothing to replay, or rows that were not sampled.
    """
    if not config.router.replay:
        return False
    if not config.model.num_experts:
        raise ValueError("config.router.replay needs a mixture of experts: set config.model.num_experts.")
    if plan.demonstrations:
        raise ValueError("config.router.replay: demonstrations were not sampled; set config.batch.demonstrations=0.")
    return True


def new_state(parts: Parts, params: PyTree, seed: int | Int[Array, ""]) -> TrainState:
    """A state at step 0 around given parameters, with fresh adapters where those learn."""
    models = _new_models(parts, params, seed)
    if parts.lora is not None:
        params = lora.add(jax.random.fold_in(jax.random.key(seed), LORA_KEY), params, parts.lora)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_optimizer(parts.optimizer, split(params, parts.frozen)[0]),
        key=jax.random.key(seed),
        ref_params=jax.tree.map(jnp.copy, params) if parts.keeps_reference else None,
        models=models,
        stats=_stats(parts),
    )


def _new_models(parts: Parts, params: PyTree, seed: int | Int[Array, ""]) -> dict[str, PyTree]:
    """The token reward model, and the judges with random weights, in whose place a run puts trained ones."""
    key = lambda purpose: jax.random.fold_in(jax.random.key(seed), purpose)
    models: dict[str, PyTree] = {}
    if parts.token_reward is not None:
        models[token_reward.NAME] = parts.token_reward.init(key(TOKEN_REWARD_KEY), params)
    for index, name in enumerate(sorted(parts.judges)):
        judge_key = jax.random.fold_in(key(JUDGES_KEY), index)
        models[name] = {"params": parts.judges[name].init(judge_key)}
    return models


def _token_reward(config: Config, model: ModelConfig) -> TokenReward | None:
    """The model that ``config.token_reward`` describes; AdamW as the policy's, at its own rate."""
    if config.token_reward is None:
        return None
    own = dict(config.token_reward)
    if set(own) != {"learning_rate"}:
        raise ValueError(f"config.token_reward has keys {sorted(own)}; it takes exactly learning_rate.")
    o = config.optimizer.to_dict()
    return TokenReward(model, learning.adamw(o, optax.constant_schedule(own["learning_rate"])))


def _stats(parts: Parts) -> dict[str, typing.Any]:
    """Counters of updates, and what slots keep between steps."""
    stats: dict[str, typing.Any] = {
        name: jnp.zeros((), jnp.int32) for name in ("skipped_updates", "skipped_in_a_row", "updates")
    }
    for slot in parts.slots.values():
        stats |= slot.initial_stats() if slot is not None else {}
    if places := parts.plan.waiting_prompts:
        stats[waiting.NAME] = waiting.nobody(places, parts.prompt_widths)
    return stats


def state_shardings(parts: Parts, mesh: Mesh) -> TrainState:
    """Where each part of the state lives: parameters by the table, moments, references and judges like them, the rest
    everywhere."""
    params = transformer.param_shapes(parts.model)
    state = jax.eval_shape(lambda params: new_state(parts, params, 0), params)
    judges = {f"models/{name}/": transformer.param_shapes(judge.model) for name, judge in parts.judges.items()}
    return sharding.like_params(state, state.params, mesh, judges)


def placed_shapes(model: ModelConfig, adapters: lora.Lora | None, mesh: Mesh) -> PyTree:
    """Shapes, types and shardings of a policy's parameters, without memory."""

    def init(key: Key[Array, ""]) -> PyTree:
        params = transformer.init(key, model)
        return params if adapters is None else lora.add(key, params, adapters)

    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(placed, shapes, sharding.param_shardings(shapes, mesh))


def init_params(experiment: Experiment) -> PyTree:
    """Random parameters, born sharded; the same whatever the mesh."""
    parts, mesh = experiment.parts, experiment.mesh
    places = sharding.param_shardings(transformer.param_shapes(parts.model), mesh)
    init = lambda key: transformer.init(key, parts.model)
    return jax.jit(init, out_shardings=places)(jax.random.key(experiment.config.seed))


def init_state(experiment: Experiment, parts: Parts, params: PyTree) -> TrainState:
    """A sharded state at step 0; ``params`` is copied, so the state may be donated."""
    # The seed is an argument, because XLA would draw from a constant one while it compiles, and slowly.
    make = lambda params, seed: new_state(parts, jax.tree.map(jnp.copy, params), seed)
    return jax.jit(make, out_shardings=state_shardings(parts, experiment.mesh))(params, experiment.config.seed)


def rows_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data, fsdp and expert, after ``leading`` uncut axes."""
    return NamedSharding(mesh, P(*(None,) * leading, sharding.ROWS))
