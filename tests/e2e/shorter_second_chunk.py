"""The run command, with a second chunk of another shape: python -m tests.e2e.shorter_second_chunk FLAGS."""

from absl import app

from experiments import config_files, run
from rl_reason import train

_next_prompts = train.Reinforcement._next_prompts


def shorter(self: train.Reinforcement, count: int):
    """One step fewer, but in the first chunk."""
    self.chunks = getattr(self, "chunks", 0) + 1
    return _next_prompts(self, count if self.chunks == 1 else count - 1)


if __name__ == "__main__":
    train.Reinforcement._next_prompts = shorter
    app.run(run.main, flags_parser=config_files.parse)
