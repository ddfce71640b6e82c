"""The smallest run that still does everything: ``--config=tests/e2e/tiny.py[:files]``.

One layer, eight tokens, no warm-up and no evaluation. An entropy bonus keeps gradients alive while no answer is right.
"files" takes rows from ``--config.data.files`` and tosses a coin on the completion's text, the same one each time.
"""

from ml_collections import ConfigDict

from configs import clipcov


def get_config(arg: str = "") -> ConfigDict:
    """A config for tests of the command line."""
    config = clipcov.get_config("smoke")
    config.num_steps, config.steps_per_call = 40, 2
    config.model.update(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16)
    config.rollout.update(completion_len=8, num_slots=8)
    config.batch.update(prompts_per_step=4, generated_prompts=4, group_size=2, train_group_size=2)
    config.regularisers.entropy = ConfigDict(dict(coef=0.01, how="token_mean", divisor=1.0))
    config.warmup.num_steps = 0
    config.evaluation.num_prompts = 0
    config.checkpoint.every = 10
    config.log.update(rollout_groups=-1, report=False)
    if arg == "files":
        config.data.update(tasks=(), levels=None, verifier="tests.e2e.verifiers:coin")
        config.verify = "split"
    return config
