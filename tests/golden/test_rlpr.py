"""RLPR by hand: probabilities of the reference, shaped rewards, the filter; and on a tiny model, what a forward says."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.methods import grpo, rlpr
from rl_reason.models import transformer
from rl_reason.models.score import score
from rl_reason.types import Prompts, Rollout
from tests.support import COMPLETION_LEN, EOS, PROMPT_WIDTH, VOCAB, tiny_model, tiny_params, tiny_prompts
from tests.tagged import TOKENIZER, always, judged, sampled

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

PROBABILITY = functools.partial(rlpr.mean_probability, aggregate="mean_probability", round_to_bf16=False)


def rows(*probabilities):
    """(logprobs, mask) of rows of given token probabilities, NaN past their end."""
    width = max(map(len, probabilities))
    padded = [[*row, *[np.nan] * (width - len(row))] for row in probabilities]
    return jnp.log(jnp.array(padded)), jnp.array([[t < len(row) for t in range(width)] for row in probabilities])


@pytest.mark.parametrize(
    "name, value",
    [
        ("mean_probability", 0.47),  # (0.9 + 0.5 + 0.01) / 3
        ("likelihood", 0.0045),  # 0.9 * 0.5 * 0.01
        ("geometric_mean", 0.165096),  # 0.0045 ** (1 / 3)
        ("mean_logprob", -1.801226),  # ln(0.0045) / 3 = -5.403678 / 3
    ],
)
def test_reference_probability(name, value):
    logprobs, mask = rows((0.9, 0.5, 0.01), ())
    out = rlpr.mean_probability(logprobs, mask, aggregate=name, round_to_bf16=False)
    np.testing.assert_allclose(out, [value, 0.0], atol=1e-6)  # an empty mask gives 0, whatever is off it


def test_reference_probability_rounded_to_bfloat16():
    # 8 significant bits: from 0.25 to 0.5 steps of 2^-9; 0.47 * 512 = 240.64, rounded 241, / 512 = 0.470703.
    logprobs, mask = rows((0.9, 0.5, 0.01))
    rounded = rlpr.mean_probability(logprobs, mask, aggregate="mean_probability", round_to_bf16=True)
    assert float(rounded[0]) == 241 / 512


def test_mean_forgives_one_token_where_the_product_does_not():
    # (.01 + .7 + .9) / 3 = .536667, (.05 + .7 + .9) / 3 = .55; products .0063 and .0315, five times as much.
    logprobs, mask = rows((0.01, 0.7, 0.9), (0.05, 0.7, 0.9))
    np.testing.assert_allclose(PROBABILITY(logprobs, mask), [0.536667, 0.55], atol=1e-6)
    product = rlpr.mean_probability(logprobs, mask, aggregate="likelihood", round_to_bf16=False)
    np.testing.assert_allclose(product, [0.0063, 0.0315], atol=1e-7)


def test_unknown_aggregates_are_refused():
    with pytest.raises(ValueError, match="there are mean_probability, mean_logprob, likelihood, geometric_mean"):
        rlpr.mean_probability(*rows((0.5,)), aggregate="median", round_to_bf16=False)


def test_shaped_reward():
    # .9 max(0, .75 - .30) + .1 = .505; B < A: .1; repeated: .505 - 1; nothing at all, repeated: stays 0.
    array = lambda *x: jnp.array(x)
    total = rlpr.shaped(
        array(0.75, 0.20, 0.75, 0.20),
        array(0.30, 0.30, 0.30, 0.30),
        array(True, True, True, False),
        array(False, False, True, True),
        format_coef=0.1,
        repetition_penalty=1.0,
    )
    np.testing.assert_allclose(total, [0.505, 0.1, -0.495, 0.0], atol=1e-6)


def test_advantages_of_shaped_rewards():
    # R = .55 .325 .1 0: mean .24375, centred .30625 .08125 -.14375 -.24375, squares .093789 .006602 .020664 .059414,
    # sum .180469 / 3 = .060156, std .245268; A = centred / .245269.
    rewards = jnp.array([[0.55, 0.325, 0.1, 0.0]])
    advantages = grpo.advantages(rewards, jnp.ones((1, 4), bool), divide_by_std=True, ddof=1, std_eps=1e-6)
    np.testing.assert_allclose(advantages[0], [1.248631, 0.331269, -0.586092, -0.993808], atol=1e-5)
    _, stats = filtered(rewards, rlpr.filter_stats(), 6)
    np.testing.assert_allclose(stats["rlpr_std_sum"], 0.245268, atol=1e-6)


# The whole reward, on text. A prompt "2+3=" and four completions; the reference is "5".
WORDS = "a " * 18
TEXTS = ["####7", "7", f"{WORDS}####7", f"a {WORDS}####7"]
EMBEDDED = dict(think_open="", think_close="", answer_open="####", answer_close="", pad_with_space=False)
RLPR: dict[str, typing.Any] = dict(
    **EMBEDDED,
    aggregate="mean_probability",
    round_to_bf16=False,
    format_coef=0.1,
    repetition_ngram=10,
    repetition_times=10,
    repetition_penalty=1.0,
)


@functools.cache
def rewarded(baseline: float | None = 0.3):
    rollout, prompts = sampled(TEXTS, baseline)
    ask = lambda rollout, prompts: rlpr.reward(
        *judged([1, 0, 1, 0]), rollout, prompts, {}, TOKENIZER, always(0.75), **RLPR
    )
    return jax.jit(ask)(rollout, prompts)


def test_reward():
    # B = .75 where there is a mark, else 0. 18 words and "####7" hold nine equal ten-grams, 19 and it ten.
    rewards = rewarded()
    np.testing.assert_allclose(rewards.parts["reference_probability"], [0.75, 0, 0.75, 0.75], atol=1e-6)
    np.testing.assert_array_equal(rewards.parts["format"], [1, 0, 1, 1])
    np.testing.assert_array_equal(rewards.parts["repetition"], [0, 0, 0, 1])
    np.testing.assert_allclose(rewards.parts["baseline"], 0.3, atol=1e-6)
    np.testing.assert_allclose(rewards.total, [0.505, 0, 0.505, -0.495], atol=1e-6)
    np.testing.assert_array_equal(rewards.correct, [1, 0, 1, 0])  # the verdict, which is no part of the reward
    assert rewards.valid.all()


def test_reward_without_a_baseline():
    # .9 * .75 + .1 = .775: the prompts have none.
    rewards = rewarded(baseline=None)
    np.testing.assert_allclose(rewards.total, [0.775, 0, 0.775, -0.225], atol=1e-6)
    np.testing.assert_array_equal(rewards.parts["baseline"], 0)


FILTER = dict(beta=0.5, ema_decay=0.99, start_record_step=6, start_filter_step=11)


@functools.partial(jax.jit, static_argnames=("beta", "ema_decay", "start_record_step", "start_filter_step"))
def _filter(rewards, valid, stats, step, **hyper):
    return rlpr.filter(rewards, valid, stats, step, **hyper)


def filtered(rewards, stats, number, valid=None, **changes):
    """The filter on step ``number``, counted from 1."""
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    return _filter(rewards, valid, stats, jnp.int32(number - 1), **FILTER | changes)


def spread(*stds):
    """Groups of two with given standard deviations: x and -x have std sqrt(2) x."""
    half = jnp.array(stds)[:, None] / np.sqrt(2)
    return jnp.concatenate([half, -half], axis=1)


def test_filter_follows_the_running_mean():
    stats = rlpr.filter_stats()
    # Steps 1-5 are not recorded; 6-10 have means .1 .2 .3 .4 .5, of groups at 0 and twice that. All are kept.
    for number in range(1, 11):
        mean = 9.0 if number < 6 else (number - 5) / 10
        keep, stats = filtered(spread(0.0, 2 * mean), stats, number)
        assert keep.all() and float(stats["rlpr_std_ema"]) == 0.0
    # Step 11: ema = .3; groups from .15 on are kept. Its own mean, over both rounds and all four groups, is .2.
    keep, stats = filtered(spread(0.14, 0.16), stats, 11)
    np.testing.assert_allclose(stats["rlpr_std_ema"], 0.3, atol=1e-6)
    np.testing.assert_array_equal(keep.all(1), [False, True])
    keep, stats = filtered(spread(0.0, 0.5), stats, 11)
    np.testing.assert_allclose(stats["rlpr_std_ema"], 0.3, atol=1e-6)
    np.testing.assert_array_equal(keep.all(1), [False, True])
    # Step 12: .99 * .3 + .01 * .2 = .299, half of it .1495.
    keep, stats = filtered(spread(0.1490, 0.1499), stats, 12)
    np.testing.assert_allclose(stats["rlpr_std_ema"], 0.299, atol=1e-6)
    np.testing.assert_array_equal(keep.any(1), [False, True])
    # Step 13: .99 * .299 + .01 * .14945 = .2975045.
    keep, stats = filtered(spread(0.1, 0.2), stats, 13)
    np.testing.assert_allclose(stats["rlpr_std_ema"], 0.2975045, atol=1e-6)


def test_filter_leaves_out_what_has_no_deviation():
    _, stats = filtered(spread(0.2, 0.2), rlpr.filter_stats(), 10)
    rewards = jnp.array([[0.0, jnp.inf], [jnp.nan, 0.0], [0.0, 0.4], [5.0, 9.0]])
    valid = jnp.array([[True, True], [True, True], [True, True], [True, False]])
    keep, stats = filtered(rewards, stats, 11, valid)
    np.testing.assert_array_equal(keep, [[False, False], [False, False], [True, True], [False, False]])
    _, stats = filtered(spread(0.2, 0.2), stats, 12)
    np.testing.assert_allclose(stats["rlpr_std_ema"], 0.99 * 0.2 + 0.01 * 0.4 / np.sqrt(2), atol=1e-6)
    # A step of which nothing is finite does not move the mean.
    _, before = filtered(jnp.full((2, 2), jnp.nan), stats, 13)
    _, after = filtered(spread(0.2, 0.2), before, 14)
    np.testing.assert_array_equal(after["rlpr_std_ema"], before["rlpr_std_ema"])


def test_keep_rate_falls_with_beta():
    # Deviations i / 50 for i = 0..49, mean .49: kept are those from beta * .49 on.
    stds = [i / 50 for i in range(50)]
    _, stats = filtered(spread(*stds), rlpr.filter_stats(), 10)
    for beta, kept in ((0.0, 50), (0.5, 37), (0.9, 27), (1.0, 25)):  # first i with i / 50 >= 0, .245, .441, .49
        keep, _ = filtered(spread(*stds), stats, 11, beta=beta)
        assert int(keep.all(1).sum()) == kept


class Thirteen(typing.NamedTuple):
    """A tokenizer for the tiny model: ids 0 to 2 are special, 12 holds a mark and a byte of the answer."""

    piece_bytes: tuple[bytes, ...] = (b"", b"", b"", b"#", b" ", *(bytes([b]) for b in b"1234567"), b"#1")
    eos_id: int = EOS
    pad_id: int = 0

    def encode(self, text: str) -> list[int]:
        return [self.piece_bytes.index(bytes([byte])) for byte in text.encode()]


TINY = tiny_model()


def tiny_scores(temperature=0.7):
    def run(params, rollout):
        mask, completion_len = rollout.completion_mask, rollout.tokens.shape[1] - PROMPT_WIDTH
        with jax.numpy_rank_promotion("allow"):  # models do broadcast
            return score(
                params, rollout.tokens, rollout.prompt_len, mask, jnp.float32(temperature), TINY, completion_len
            ).logprobs

    return run


def test_reference_probability_is_the_plain_forwards():
    assert len(Thirteen().piece_bytes) == VOCAB
    temperature, params, prompts = 0.7, tiny_params(TINY), tiny_prompts(4)
    reference = [[5, 6], [7], [], [8, 9, 10]]
    padded = jnp.array([[*ids, *[0] * (3 - len(ids))] for ids in reference])
    prompts = Prompts(prompts.tokens, prompts.prompt_len, prompts.example_id, prompts.uid, reference=padded)
    # "1#1": the second token holds the mark and the answer, and is spelled "#" when the answer goes.
    width, length = PROMPT_WIDTH + COMPLETION_LEN, np.asarray(prompts.prompt_len)
    tokens = np.zeros((4, width), np.int32)
    for row, n in enumerate(length):
        tokens[row, :n] = prompts.tokens[row, :n]
        tokens[row, n : n + 3] = [5, 12, EOS]
    columns = np.arange(width)
    zeros = jnp.zeros((4, width))
    rollout = Rollout(
        tokens=jnp.asarray(tokens),
        prompt_len=prompts.prompt_len,
        completion_mask=jnp.asarray((columns >= length[:, None]) & (columns < length[:, None] + 3)),
        rollout_logprobs=zeros,
        sampled_logprobs=zeros,
        prompt_id=jnp.arange(4, dtype=jnp.int32),
        truncated=jnp.zeros(4, bool),
        off_policy=jnp.zeros(4, bool),
    )
    hyper = RLPR | dict(answer_open="#")
    ask = jax.jit(
        lambda params: rlpr.reward(*judged([1] * 4), rollout, prompts, params, Thirteen(), tiny_scores(), **hyper)
    )
    begin = jax.jit(
        lambda params: rlpr.baseline(
            prompts, rollout, params, Thirteen(), tiny_scores(), pad_with_space=True, aggregate="mean_probability"
        )
    )

    @jax.jit
    def every_logprob(ids):
        with jax.numpy_rank_promotion("allow"):
            hidden = transformer.forward(params, ids, ids != 0, TINY).hidden
        return jax.nn.log_softmax(hidden @ transformer.unembedding(params, TINY) / temperature)

    def plain(*between):
        """Mean probability of each reference behind its prompt and some tokens, gathered from all log-probabilities."""
        starts = [[*np.asarray(prompts.tokens[row, :n]), *between] for row, n in enumerate(length)]
        ids = np.zeros((4, width), np.int32)
        for row, start, rest in zip(ids, starts, reference, strict=True):
            row[: len(start) + len(rest)] = [*start, *rest]
        logprobs = np.asarray(every_logprob(ids))
        gathered = [
            [logprobs[row, len(start) + t - 1, token] for t, token in enumerate(rest)]
            for row, (start, rest) in enumerate(zip(starts, reference, strict=True))
        ]
        return [np.mean(np.exp(row)) if row else 0.0 for row in gathered]

    found = ask(params)
    np.testing.assert_allclose(found.parts["reference_probability"], plain(5, 3), atol=1e-5)  # behind "1#"
    np.testing.assert_allclose(begin(params), plain(4), atol=1e-5)  # behind a space
