"""What to change in a config whose step does not fit a slice, by what its memory is full of."""

import typing
from collections.abc import Iterator, Sequence

from rl_reason import build, sharding
from rl_reason.ahead.memory import Need
from rl_reason.ahead.topology import GIB

STATE_ROWS = ("parameters", "optimizer", "reference", "other models", "other policies")


class Lever(typing.NamedTuple):
    """A change, and the bytes a device that it is good for: exact for what is counted by shapes, else a bound."""

    change: str
    saves: int
    exact: bool

    def describe(self) -> str:
        """'rollout.num_slots=256 saves 0.44 GiB'."""
        return f"{self.change} saves {'' if self.exact else 'up to '}{self.saves / GIB:.2f} GiB"


def levers(experiment: build.Experiment, needs: Sequence[Need], hbm_bytes: int) -> list[Lever]:
    """What helps the programs that do not fit, best first, each change once."""
    found: dict[str, Lever] = {}
    for need in needs:
        if not need.fits(hbm_bytes):
            for lever in (*_of_state(experiment, need), *_of_rollout(experiment, need), *_of_update(experiment, need)):
                best = found.get(lever.change)
                if lever.saves > 0 and (best is None or lever.saves > best.saves):
                    found[lever.change] = lever
    return sorted(found.values(), key=lambda lever: -lever.saves)


def _of_state(experiment: build.Experiment, need: Need) -> Iterator[Lever]:
    parts, model = need.parts, experiment.parts.model
    sizes, temporary = dict(experiment.mesh.shape), need.parts["temporaries"]
    yield Lever("a slice of twice the chips, on mesh.fsdp,", sum(parts[row] for row in STATE_ROWS) // 2, True)
    if experiment.config.optimizer.mu_dtype != "bfloat16" and model.param_dtype == "float32":
        yield Lever("optimizer.mu_dtype='bfloat16'", parts["optimizer"] // 4, True)  # half of one of two moments
    if model.param_dtype == "float32":  # of what learns, fp32 masters take up what this saves
        yield Lever("model.param_dtype='bfloat16'", parts["reference"] // 2, True)
    if sizes["expert"] < model.num_experts and sizes["fsdp"] > 1:
        yield Lever(f"mesh.expert={2 * sizes['expert']} in place of half of fsdp", temporary // 2, False)
    if model.num_kv_heads % (2 * sizes["tensor"]) == 0 and sizes["fsdp"] > 1:
        yield Lever(f"mesh.tensor={2 * sizes['tensor']} in place of half of fsdp", temporary // 2, False)


def _of_rollout(experiment: build.Experiment, need: Need) -> Iterator[Lever]:
    if not need.parts["KV cache"]:
        return
    rollout, plan = experiment.parts.rollout, experiment.parts.plan
    shards = sharding.num_row_shards(experiment.mesh)
    own = rollout.num_slots * rollout.completion_len
    prompts = plan.generated_prompts * experiment.parts.prompt_widths.prompt
    half = need.parts["KV cache"] * own // (own + prompts) // 2
    if rollout.num_slots // 2 >= shards:
        yield Lever(f"rollout.num_slots={rollout.num_slots // 2}", half, True)
    yield Lever(f"rollout.completion_len={rollout.completion_len // 2}", half, True)
    rows = rollout.prefill_rows or plan.generated_prompts
    if rows // 2 >= shards:
        yield Lever(f"rollout.prefill_rows={rows // 2}", need.parts["temporaries"] // 2, False)


def _of_update(experiment: build.Experiment, need: Need) -> Iterator[Lever]:
    parts, temporary = experiment.parts, need.parts["temporaries"]
    if need.parts["KV cache"] and not need.program.startswith("chunk"):
        return  # it draws, and learns nothing
    rows = parts.plan.microbatch_rows or parts.plan.minibatch_rows
    if experiment.config.loop in ("rl", "cohort") and rows // 2 >= sharding.num_row_shards(experiment.mesh):
        yield Lever(f"batch.microbatch_rows={rows // 2}", temporary // 2, False)
    if experiment.config.loop == "preference":
        yield Lever(f"preference.microbatches={2 * experiment.config.preference.microbatches}", temporary // 2, False)
    if parts.model.remat == "none":
        yield Lever("model.remat='full'", temporary * (parts.model.num_layers - 1) // parts.model.num_layers, False)
    if experiment.config.loop == "rl":
        yield Lever(f"rollout.completion_len={parts.rollout.completion_len // 2}", temporary // 2, False)
