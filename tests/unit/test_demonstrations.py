"""Demonstrations as rows: where their tokens go, what they count for, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.batch import BatchPlan
from rl_reason.loop.chunk import make_step
from rl_reason.loop.demonstrations import demonstration_rows, join_groups
from rl_reason.loop.step import sample_phase
from tests import support
from tests.e2e import loops

PROMPTS = dataclasses.replace(
    support.tiny_prompts(2), tokens=jnp.array([[5, 6, 0], [7, 0, 0]]), prompt_len=jnp.array([2, 1]), demonstration=None
)
SHOWN = dataclasses.replace(PROMPTS, demonstration=jnp.array([[8, 9, support.EOS], [10, support.EOS, support.PAD]]))


def test_a_row_is_prompt_demonstration_padding():
    rows = demonstration_rows(SHOWN, 1, support.tiny_rollout(completion_len=4))
    assert rows.tokens.tolist() == [[5, 6, 8, 9, 2, 0, 0], [7, 10, 2, 0, 0, 0, 0]]
    assert rows.completion_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0]]
    assert rows.off_policy.all() and not rows.truncated.any() and not rows.rollout_logprobs.any()


def test_groups_end_with_their_demonstrations():
    plan = BatchPlan(2, 3, 3, 2, 1, 1, 1, 0, demonstrations=1)
    rollout = support.tiny_rollout(group_size=plan.num_samples, completion_len=4)
    rows = demonstration_rows(SHOWN, 2, rollout)  # stands in for samples: two a prompt
    joined = join_groups(rows, demonstration_rows(SHOWN, 1, rollout), plan)
    assert joined.prompt_id.tolist() == [0, 0, 0, 1, 1, 1]
    assert joined.tokens[2].tolist() == [5, 6, 8, 9, 2, 0, 0] and joined.tokens[5].tolist() == [7, 10, 2, 0, 0, 0, 0]


def test_refusals():
    with pytest.raises(ValueError, match="the prompts do not bring"):
        demonstration_rows(PROMPTS, 1, support.tiny_rollout())
    with pytest.raises(ValueError, match=r"max_demonstration_len_tokens=3 is more than rollout\.completion_len=2"):
        demonstration_rows(SHOWN, 1, support.tiny_rollout(completion_len=2))


@functools.cache
def parts():
    return support.tiny_parts("luffy", group_size=4, train_group_size=4, demonstrations=1)


def shown_prompts():
    prompts = loops.prompts_of(parts(), 0)
    demonstration = jnp.tile(jnp.array([[7, 8, support.EOS]]), (len(prompts.uid), 1))
    return dataclasses.replace(prompts, demonstration=demonstration)


def test_samples_are_what_they_are_without_demonstrations():
    # The demonstration joins after sampling: it moves no random number.
    alone = dataclasses.replace(
        parts(), plan=dataclasses.replace(parts().plan, group_size=3, train_group_size=3, demonstrations=0)
    )
    draw = lambda parts: jax.jit(functools.partial(sample_phase, parts))(
        loops.start(parts), shown_prompts(), loops.LIVE
    )
    joined, plain = draw(parts())[0], draw(alone)[0]
    sampled = joined.tokens.reshape(-1, 4, joined.tokens.shape[1])[:, :3].reshape(plain.tokens.shape)
    np.testing.assert_array_equal(sampled, plain.tokens)


def test_metrics_speak_of_samples():
    """The demonstration (7 + 8 + EOS is odd) is judged like the samples but is none of them."""
    rows = dataclasses.replace(parts(), log_groups=-1)
    _, (metrics, sampled) = jax.jit(make_step(rows, support.parity_verify))(
        loops.start(rows), shown_prompts(), loops.LIVE
    )
    drawn = ~np.asarray(sampled.off_policy)
    assert drawn.sum() == 3 * len(drawn) / 4
    assert float(metrics["critic/score/mean"]) == pytest.approx(np.asarray(sampled.correct)[drawn].mean())
    length = np.asarray(sampled.completion_mask).sum(1)
    assert float(metrics["response_length/mean"]) == pytest.approx(length[drawn].mean())
    assert np.asarray(sampled.correct)[~drawn].tolist() == [0.0] * int((~drawn).sum())  # 7 + 8 + 2 is odd
    assert float(metrics["actor/off_policy_prob"]) > 0
