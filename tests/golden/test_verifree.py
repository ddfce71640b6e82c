"""VeriFree by hand: advantages, both terms, their gradient, the rows trained on; and General-Reasoner's reward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.aggregation import aggregate
from rl_reason.methods import general_reasoner, rloo, verifree
from tests.tagged import ASKED, TOKENIZER, always, judged, sampled

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

# p = .8 .4 .2 0, the last row without a tag. Mean .35, A = 4/3 (p - .35) = .6, .066667, -.2, -.466667.
P = jnp.array([0.8, 0.4, 0.2, 0.0])
THINK = jnp.array([-2.0, -1.5, -3.0, -2.5])  # sums of log-probabilities of the reasoning, in two tokens each


def verifree_loss(logprobs):
    """Columns 0 and 1 are reasoning, 2 is the reference, 3 is neither."""
    mask = jnp.array([[True, True, True, False]] * 3 + [[True, True, False, False]])
    reference = jnp.array([[False, False, True, False]] * 3 + [[False] * 4])
    advantages = rloo.advantages(P.reshape(1, 4), jnp.ones((1, 4), bool)).reshape(4, 1)
    terms, metrics = verifree.objective(logprobs, jnp.broadcast_to(advantages, (4, 4)), P, mask, reference)
    losses = {name: aggregate(term, mask, "seq_mean_token_sum") for name, term in terms.items()}
    return sum(losses.values()), (losses, metrics)


def verifree_logprobs():
    reference = jnp.log(jnp.where(P > 0, P, 1.0))
    return jnp.stack([THINK / 2, THINK / 2, reference, jnp.full(4, jnp.nan)], axis=1)


def test_advantages_are_leave_one_out():
    advantages = rloo.advantages(P.reshape(1, 4), jnp.ones((1, 4), bool))
    np.testing.assert_allclose(advantages[0], [0.6, 0.066667, -0.2, -0.466667], atol=1e-6)
    # Without the second row: .8 - mean(.2, 0) = .7, .2 - .4 = -.2, 0 - .5; a group of one has nobody to compare with.
    advantages = rloo.advantages(P.reshape(1, 4), jnp.array([[True, False, True, True]]))
    np.testing.assert_allclose(advantages[0], [0.7, 0, -0.2, -0.5], atol=1e-6)
    np.testing.assert_array_equal(rloo.advantages(P.reshape(4, 1), jnp.ones((4, 1), bool)), 0.0)


def test_verifree_loss():
    # policy: (.6 * 2 + .066667 * 1.5 - .2 * 3 - .466667 * 2.5) / 4 = -.466667 / 4 = -.116667.
    # reference: (.8 * .223144 + .4 * .916291 + .2 * 1.609438) / 4 = .866919 / 4 = .216730; the row without one counts.
    total, (losses, metrics) = verifree_loss(verifree_logprobs())
    assert float(losses["policy"]) == pytest.approx(-0.116667, abs=1e-6)
    assert float(losses["reference"]) == pytest.approx(0.216730, abs=1e-6)
    assert float(total) == pytest.approx(0.100063, abs=1e-6)
    # (-.223144 - .916291 - 1.609438) / 3
    assert float(metrics["verifree/reference_logprob"]) == pytest.approx(-0.916291, abs=1e-6)


def test_verifree_gradient():
    # -A / 4 on reasoning, -p / 4 on the reference, nothing elsewhere.
    grad = jax.grad(lambda x: verifree_loss(x)[0])(verifree_logprobs())
    a, p = np.array([0.6, 0.066667, -0.2, -0.466667]) / 4, np.array([0.8, 0.4, 0.2, 0.0]) / 4
    np.testing.assert_allclose(grad, np.stack([-a, -a, -p, 0 * a], axis=1), atol=1e-6)


def verifree_rewarded(texts, **kind):
    rollout, prompts = sampled(texts, reference=TOKENIZER.encode("55"), **kind)
    hyper = dict(answer_open="####", pad_with_space=False)
    ask = lambda rollout, prompts: verifree.reward(
        *judged([1] * len(texts)), rollout, prompts, {}, TOKENIZER, always(0.5), **hyper
    )
    return jax.jit(ask)(rollout, prompts), rollout


def test_verifree_rows():
    # Two tokens at .5: p = .25. "1####7" becomes "1####55" with EOS: trained on are what was sampled, "1####", and "55".
    (rewards, rows), rollout = verifree_rewarded(["1####7", "7"])
    np.testing.assert_allclose(rewards.total, [0.25, 0.0], atol=1e-6)
    assert rows.reference_mask is not None
    start, five, mark = len(ASKED), TOKENIZER.encode("5")[0], TOKENIZER.encode("####")
    kept = len(TOKENIZER.encode("1####"))
    assert rows.tokens[0, start : start + kept + 3].tolist() == [
        *TOKENIZER.encode("1"), *mark, five, five, TOKENIZER.eos_id
    ]  # fmt: skip
    columns = np.arange(rows.tokens.shape[1])
    reference = (columns >= start + kept) & (columns < start + kept + 2)
    np.testing.assert_array_equal(rows.reference_mask[0], reference)
    np.testing.assert_array_equal(rows.completion_mask[0], (columns >= start) & (columns < start + kept + 2))
    # The sampler's log-probabilities stay with its tokens; the reference has the policy's.
    np.testing.assert_allclose(rows.rollout_logprobs[0][reference], np.log(0.5), atol=1e-6)
    np.testing.assert_array_equal(rows.rollout_logprobs[0, start : start + kept], -0.5)
    np.testing.assert_array_equal(rows.sampled_logprobs[0, start : start + kept], -0.25)
    assert not rows.rollout_logprobs[0, start + kept + 2 :].any()
    # Without a mark the row is trained on as it was sampled.
    np.testing.assert_array_equal(rows.tokens[1], rollout.tokens[1])
    np.testing.assert_array_equal(rows.completion_mask[1], rollout.completion_mask[1])
    assert not rows.reference_mask[1].any()


def test_verifree_without_an_end():
    (rewards, rows), rollout = verifree_rewarded(["1####7"], truncated=True)
    assert float(rewards.total[0]) == 0.0 and rows.reference_mask is not None and not rows.reference_mask.any()
    np.testing.assert_array_equal(rows.tokens, rollout.tokens)
    np.testing.assert_array_equal(rows.completion_mask, rollout.completion_mask)


def test_general_reasoner_reward():
    # The reference "55" has 2 tokens. Right with 2: 1; with 4: 1 - .05 * 2; with 14: 12 more, of which 10 count: .5.
    # Wrong: 0. No mark, or nothing behind it: -.5. Blanks around an answer are no part of it.
    texts = ["####55", "1#### 5555 ", f"####{'5' * 14}", "####54", "55", "####  "]
    rollout, prompts = sampled(texts, reference=TOKENIZER.encode("55"))
    rewards = general_reasoner.reward(
        *judged([1, 1, 1, 0, 1, 0]),
        rollout,
        prompts,
        TOKENIZER,
        answer_open="####",
        answer_close="",
        no_answer=-0.5,
        length_coef=0.05,
        max_length_gap_tokens=10,
    )
    np.testing.assert_allclose(rewards.total, [1, 0.9, 0.5, 0, -0.5, -0.5], atol=1e-6)
    np.testing.assert_array_equal(rewards.parts["format"], [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rewards.parts["length_gap"], [0, 2, 12, 0, 0, 0])
    np.testing.assert_array_equal(rewards.correct, [1, 1, 1, 0, 1, 0])
