"""What a loop is made of: everything static about a run, in one place."""

import dataclasses
import typing
from collections.abc import Callable, Mapping

import optax
from jaxtyping import PyTree

from rl_reason.batch import BatchPlan
from rl_reason.judging import Judge
from rl_reason.loop.token_reward import TokenReward
from rl_reason.loop.waiting import PromptWidths
from rl_reason.models import lora
from rl_reason.models.lora import Lora
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig
from rl_reason.slots import Slot
from rl_reason.types import TrainState


@dataclasses.dataclass(frozen=True)
class Parts:
    """The static half of training; ``TrainState`` is the other half."""

    model: ModelConfig
    rollout: RolloutConfig
    plan: BatchPlan
    prompt_widths: PromptWidths
    slots: Mapping[str, Slot | None]
    optimizer: optax.GradientTransformation
    schedule: Callable[[typing.Any], typing.Any]  # learning rate by update, for the metrics
    frozen: tuple[str, ...]  # patterns of parameter paths that do not learn; with adapters all but these
    lora: Lora | None  # adapters that learn in place of the parameters
    skip_above_norm: float  # updates with a larger gradient are skipped; 0: none
    aggregation: Mapping[str, Mapping[str, typing.Any]]
    regularisers: Mapping[str, Mapping[str, typing.Any] | None]
    router_coefs: Mapping[str, float]
    objective_scope: str  # "minibatch", or "microbatch" for parity with the authors' forks
    token_reward: TokenReward | None  # learns beside the policy, for objectives that weigh tokens
    judges: Mapping[str, Judge]  # frozen models that the reward slot may ask, by name; parameters in TrainState.models
    tokenizer: typing.Any  # for rewards that read what tokens spell
    log_groups: int  # groups of each step whose rollouts are handed out; -1 is all

    def wants(self, name: str) -> bool:
        """Whether any slot or regulariser asks for an array."""
        if name == "ref_logprobs" and self.regularisers.get("kl"):
            return True
        return any(slot is not None and name in slot.wants for slot in self.slots.values())

    @property
    def keeps_reference(self) -> bool:
        """Whether the initial policy has to be kept; adapters leave it as it was."""
        return self.lora is None and (self.wants("ref_logprobs") or self.wants("ref_params"))

    def reference(self, state: TrainState) -> PyTree | None:
        """The frozen initial policy's parameters; None where there is no such."""
        return lora.base(state.params) if self.lora is not None else state.ref_params
