"""One RL step of two prompts with two samples each, for ``--config.weights`` of any size: ``--config=tests/e2e/large.py``.

An entropy bonus gives a gradient, because nothing that random weights write is right.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """A config for tests of what a model needs."""
    del arg
    config = base.get_config("smoke")
    config.num_steps = config.steps_per_call = config.checkpoint.every = 1
    config.model.update(scan_layers=True, scan_decode=True, remat="full")
    config.rollout.update(completion_len=8, num_slots=4)
    config.batch.update(
        prompts_per_step=2, group_size=2, train_group_size=2, generated_prompts=2, minibatches=1, microbatch_rows=2
    )
    config.regularisers.entropy = ConfigDict(dict(coef=1.0, how="token_mean", divisor=1.0))
    config.optimizer.update(learning_rate=1e-4, lr_warmup_updates=0)
    config.evaluation.num_prompts = 0
    config.log.report = False
    return config
