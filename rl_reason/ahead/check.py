"""One config against one slice, and the search for the smallest slice that fits."""

import contextlib
import dataclasses
import pathlib
import tempfile
import typing
from collections.abc import Callable, Iterator

import jax

from configs.common import Config
from rl_reason import build
from rl_reason.ahead import memory, topology
from rl_reason.ahead.levers import Lever, levers
from rl_reason.ahead.memory import Need
from rl_reason.ahead.programs import device_bytes, programs
from rl_reason.ahead.stand_in import stand_in
from rl_reason.ahead.topology import Slice
from rl_reason.models import transformer

Compiling = Callable[[str], contextlib.AbstractContextManager]  # entered while the program of that name is compiled


@dataclasses.dataclass(frozen=True)
class Checked:
    """What compiling a step for a slice found."""

    slice: Slice
    experiment: build.Experiment
    tokenizer: str  # as the config names it, here or not
    replaced: tuple[str, ...]  # what stood in for what this machine lacks
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits(self.hbm_bytes) for need in self.needs)

    @property
    def hbm_bytes(self) -> int:
        return self.slice.generation.hbm_bytes

    @property
    def largest(self) -> Need:
        """The program that needs most."""
        return max(self.needs, key=lambda need: need.total)

    @property
    def levers(self) -> list[Lever]:
        return levers(self.experiment, self.needs, self.hbm_bytes)


def check(config: Config, name: str, compiling: Compiling) -> Checked:
    """Compiles every program of a step for the slice of that name.

    Raises:
        TopologyError: no such slice, or no libtpu.
        ValueError: whatever is wrong with the config, or what does not divide over the slice.
        RefusedError: the compiler refused a program for another reason than memory.
    """
    where = topology.find(name)
    experiment, replaced = described(config, where)
    needs = []
    for program in programs(experiment):
        with compiling(f"{program.name} for {name}"):
            needs.append(memory.measured(program, experiment.mesh))
    return Checked(where, experiment, config.tokenizer, tuple(replaced), tuple(needs))


def described(config: Config, where: Slice) -> tuple[build.Experiment, list[str]]:
    """The experiment on a slice's devices, and what stands in for what is missing here."""
    with tempfile.TemporaryDirectory() as folder:
        config, replaced = stand_in(config, pathlib.Path(folder))
        return build.build(config, list(where.devices)), replaced


def search(config: Config, generation: str, compiling: Compiling) -> Iterator[tuple[str, Checked | str]]:
    """Slices of a generation from the smallest on until a step fits: each with what was found, or why it was passed over.

    A slice is not compiled for where batches do not divide over it, or where states and caches alone are too large.

    Raises:
        TopologyError: no such generation, or no libtpu.
        RefusedError: the compiler refused a program for another reason than memory.
    """
    for name in topology.slices(generation):
        where = topology.find(name)
        try:
            experiment, _ = described(config, where)
            needed = max(_by_shapes(program) for program in programs(experiment))
        except ValueError as error:
            yield name, str(error)
            continue
        if needed > where.generation.hbm_bytes:
            yield name, f"{needed / topology.GIB:.1f} GiB of states, batches and caches alone"
            continue
        found = check(config, name, compiling)
        yield name, found
        if found.fits:
            return


def _by_shapes(program: typing.Any) -> int:
    """What a program needs at the least."""
    cache = 0 if program.draws is None else memory.cache_bytes(program.draws)
    return device_bytes(program.state) + cache


def record(checked: Checked) -> dict[str, typing.Any]:
    """What was found, as JSON; bytes are a device's."""
    experiment, where = checked.experiment, checked.slice
    total, active = transformer.num_params(experiment.parts.model)
    return {
        "topology": where.name,
        "slice": where.describe(),
        "chips": where.chips,
        "devices_per_chip": where.generation.devices_per_chip,
        "hbm_bytes": checked.hbm_bytes,
        "fits": checked.fits,
        "largest": checked.largest.program,
        "mesh": {axis: size for axis, size in experiment.mesh.shape.items() if size > 1},
        "tokenizer": checked.tokenizer,
        "params": total,
        "active_params": active,
        "dtype": experiment.parts.model.dtype,
        "param_dtype": experiment.parts.model.param_dtype,
        "check_every": experiment.parts.rollout.check_every,
        "plan": experiment.describe(),
        "versions": {"jax": jax.__version__, "libtpu": where.libtpu},
        "replaced": list(checked.replaced),
        "levers": [lever.describe() for lever in checked.levers],
        "programs": [_record_of(need) for need in checked.needs],
    }


def _record_of(need: Need) -> dict[str, typing.Any]:
    sent = need.traffic
    return {
        "name": need.program,
        "bytes": dict(need.parts),
        "total_bytes": need.total,
        "refused": need.refused,
        "seconds": round(need.seconds, 1),
        "loops": list(need.loops),
        # A run of the program, then a pass of each loop without a known end, outermost first.
        "sent_bytes": [] if sent is None else [sent.of(depth) for depth in range(sent.depth + 1)],
    }
