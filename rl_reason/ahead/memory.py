"""What the programs of a step need on one device, by the compiler's own account and by shapes."""

import dataclasses
import re
import time
from collections.abc import Mapping

import jax

from rl_reason import build, sharding
from rl_reason.ahead.collectives import Traffic, traffic
from rl_reason.ahead.programs import Program, device_bytes
from rl_reason.models import transformer
from rl_reason.types import TrainState

STATE = {"params": "parameters", "opt_state": "optimizer", "ref_params": "reference", "models": "other models"}
ROWS = (*STATE.values(), "other policies", "batch", "KV cache", "temporaries", "code")  # in the order of a table
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class RefusedError(Exception):
    """The compiler refused a program for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one program needs on a device, by ROWS, with everything that lives beside it.

    ``refused``: the compiler gave up for want of memory, and then says of temporaries alone how much they would be.
    """

    program: str
    parts: Mapping[str, int]
    seconds: float  # of compiling
    refused: bool
    traffic: Traffic | None  # None: refused
    loops: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, hbm_bytes: int) -> bool:
        return not self.refused and self.total <= hbm_bytes


def measured(program: Program, mesh: jax.sharding.Mesh) -> Need:
    """Compiles a program for the mesh's devices, which need not be here.

    Raises:
        RefusedError: with what the compiler said.
    """
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.function.trace(*program.arguments).lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            temporary = refused_bytes(str(error))
            if temporary is None:
                raise RefusedError(f"{program.name}: {str(error).splitlines()[0]}") from error
            arguments = device_bytes(program.arguments)
            parts = _parts(program, arguments, 0, temporary, 0)
            return Need(program.name, parts, time.perf_counter() - began, True, None, program.loops)
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu always says"
    given = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = memory.argument_size_in_bytes, given, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    seconds = time.perf_counter() - began
    return Need(program.name, _parts(program, *sizes), seconds, False, traffic(compiled.as_text()), program.loops)


def refused_bytes(message: str) -> int | None:
    """Bytes of temporaries that a refusal for want of memory names; None for another refusal.

    >>> refused_bytes("Ran out of memory on HBM, the total memory required for HLO temporaries (1.50K) exceeds ...")
    1536
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)i?B? of", message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return round(float(number) * _UNITS[unit])


def _parts(program: Program, arguments: int, given: int, temporary: int, code: int) -> dict[str, int]:
    """By row. Arguments are the compiler's number, which pads arrays to tiles: what it pads counts as batch."""
    own, others = _states(program)
    named = {row: device_bytes(getattr(own, field)) for field, row in STATE.items()}
    passed = {id(x) for x in jax.tree.leaves(program.arguments)}
    resident = [x for x in jax.tree.leaves(program.state) if id(x) not in passed]
    beside = [x for x in jax.tree.leaves(program.beside) if id(x) not in passed]
    cache = 0 if program.draws is None else min(cache_bytes(program.draws), temporary)
    everything = arguments + device_bytes(resident) + device_bytes(beside) + given
    return named | {
        "other policies": device_bytes(others),
        "batch": everything - sum(named.values()) - device_bytes(others),
        "KV cache": cache,
        "temporaries": temporary - cache,
        "code": code,
    }


def _states(program: Program) -> tuple[TrainState, list[TrainState]]:
    """The state that a program works on, and those of a cohort's other policies."""
    if isinstance(program.state, TrainState):
        return program.state, []
    own = next(x for x in program.arguments if isinstance(x, TrainState))
    return own, [state for state in program.state.values() if state is not own]


def cache_bytes(experiment: build.Experiment) -> int:
    """Bytes on a device of the keys and values that a rollout holds: of all prompts, and of all slots."""
    parts = experiment.parts
    model, rollout = parts.model, parts.rollout
    positions = parts.plan.generated_prompts * parts.prompt_widths.prompt + rollout.num_slots * rollout.completion_len
    with jax.sharding.use_abstract_mesh(experiment.mesh.abstract_mesh):
        axis = sharding.heads_axis(model.num_kv_heads)
    heads = experiment.mesh.shape[axis] if axis else 1
    return positions * transformer.kv_bytes(model) // (sharding.num_row_shards(experiment.mesh) * heads)
