"""On policy, NFT's gradient of all parameters is that of group-relative policy gradients, through the whole update.

Same rows, old = logprobs, fp32, no KL and no entropy bonus; success rates 1/2 and 1/3, which the clamp does not bind. The
golden tests hold the same for each token in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import term
from rl_reason.batch import BatchPlan
from rl_reason.loop.update import loss_and_gradient
from rl_reason.methods import grpo
from tests.property.test_laws import ROWS, rows_for
from tests.support import load_config, tiny_params, tiny_parts

GROUP = 4


def parts_of(name, microbatch_rows=0, **changes):
    """A config's parts around a tiny model: one minibatch of two groups of four, no regularisers."""
    config = load_config(name)
    for key, value in changes.items():
        config[key].update(value)
    parts = tiny_parts(config)
    sizes = dict(
        prompts_per_step=2,
        generated_prompts=2,
        group_size=GROUP,
        train_group_size=GROUP,
        minibatches=1,
        microbatch_rows=microbatch_rows,
    )
    plan = BatchPlan(**dataclasses.asdict(parts.plan) | sizes)
    return dataclasses.replace(parts, plan=plan, regularisers=dict(kl=None, entropy=None))


def rows_and_advantages(model, divide_by_std):
    """Groups 1 0 0 1 and -, 1, 0, 0: the fifth row's verifier failed, the fourth has no token but a verdict."""
    correct = jnp.array([1.0, 0, 0, 1, 1, 1, 0, 0])
    valid = jnp.arange(ROWS) != 4
    groups = lambda x: x.reshape(-1, GROUP)
    advantages = grpo.advantages(groups(correct), groups(valid), divide_by_std=divide_by_std, ddof=0, std_eps=0.0)
    rows = rows_for(model, old=False)
    return dataclasses.replace(
        rows,
        rewards=correct,
        correct=correct,
        success_rate=jnp.repeat(jnp.array([1 / 2, 1 / 3]), GROUP),
        advantages=jnp.where(rows.completion_mask, advantages.reshape(-1, 1), 0.0),
    )


def flat_gradient(parts, rows):
    params = tiny_params(parts.model)
    run = jax.jit(lambda params, rows: loss_and_gradient(parts, params, rows, jax.random.key(0), jnp.float32(1.0)))
    return np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(run(params, rows)[2])])


@pytest.mark.parametrize("microbatch_rows", [0, 2])
@pytest.mark.parametrize("normalize", [1, 2])
def test_nft_on_policy_is_group_relative(normalize, microbatch_rows):
    nft = parts_of("nft", microbatch_rows, objective=dict(normalize=normalize))
    other = parts_of("dr_grpo", microbatch_rows, aggregation=dict(policy=term("sum", divisor=1000.0)))
    rows = rows_and_advantages(nft.model, divide_by_std=normalize == 2)
    got, want = flat_gradient(nft, rows), flat_gradient(other, rows)
    norm, wanted = np.linalg.norm(got), np.linalg.norm(want)
    assert wanted > 1e-4
    assert got @ want / (norm * wanted) > 0.9999
    assert norm / wanted == pytest.approx(1, abs=1e-3)


def test_another_weight_is_another_gradient():
    # The test above can fail: without the prompts' weights the two groups count otherwise.
    nft = parts_of("nft", objective=dict(normalize=0))
    rows = rows_and_advantages(nft.model, divide_by_std=False)
    got, want = flat_gradient(nft, rows), flat_gradient(parts_of("dr_grpo"), rows)
    assert got @ want / (np.linalg.norm(got) * np.linalg.norm(want)) < 0.9999


def test_rft_drops_the_wrong_rows():
    rft = parts_of("nft", objective=dict(neg_weight=0.0))
    rows = rows_and_advantages(rft.model, divide_by_std=False)
    right_only = dataclasses.replace(rows, completion_mask=rows.completion_mask & (rows.correct > 0)[:, None])
    np.testing.assert_allclose(flat_gradient(rft, rows), flat_gradient(parts_of("nft"), right_only), atol=1e-9)


def test_the_rft_variant_differs_from_nft_in_one_number():
    nft, rft = (load_config("nft", arg).to_dict() for arg in ("", "rft"))
    assert rft["objective"].pop("neg_weight") == 0.0 and nft["objective"].pop("neg_weight") == 1.0
    assert rft == nft
