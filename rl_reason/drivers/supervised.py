"""Driving maximum likelihood as the whole of a run: worked solutions packed into rows."""

import jax
from jaxtyping import PyTree

from rl_reason import build, processes
from rl_reason.data.packing import packed_stream
from rl_reason.drivers.base import Driver, run_chunk
from rl_reason.loop import supervised
from rl_reason.loop.engine import Advanced
from rl_reason.types import TrainState


class Supervised(Driver):
    """Chunks of supervised steps on the config's worked solutions."""

    phase: str = "sft"
    programs: tuple[str, ...] = ("supervised_chunk",)

    def __init__(self, experiment: build.Experiment):
        self._experiment = experiment
        config = experiment.config
        rows = build.rows_sharding(experiment.mesh)
        self._stream = packed_stream(
            experiment.train,
            experiment.tokenizer,
            rows_per_batch=config.supervised.rows_per_step,
            row_len=config.supervised.row_len_tokens,
            direct_share=config.supervised.direct_share,
            rows=processes.local_rows(rows, config.supervised.rows_per_step),
        )
        self._chunk = jax.jit(supervised.make_packed_chunk(experiment.parts), donate_argnums=0)

    def initial_state(self, params: PyTree) -> TrainState:
        return build.init_state(self._experiment, self._experiment.parts, params)

    def advance(self, state: TrainState) -> Advanced:
        steps = self._experiment.config.steps_per_call
        return run_chunk(self._chunk, state, supervised.Demonstrations(*self._drawn(steps)), steps)
