"""The run command, with a second chunk of another shape: python -m tests.e2e.shorter_second_chunk FLAGS."""

from absl import app

from experiments import config_files, run
from rl_reason.drivers.reinforcement import Reinforcement

_advance = Reinforcement.advance


def shorter(self: Reinforcement, state):
    """One step fewer, but in the first chunk."""
    out = _advance(self, state)
    self._steps = self._experiment.config.steps_per_call - 1
    return out


if __name__ == "__main__":
    Reinforcement.advance = shorter
    app.run(run.main, flags_parser=config_files.parse)
