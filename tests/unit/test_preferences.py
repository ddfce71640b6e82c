"""Preference data: what a response is worth, judges, selection arms, users' files, streams."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rl_reason.data import preferences
from rl_reason.data.pairs import PairData, PairReading, Preference, load_pairs, pairs_stream
from rl_reason.data.preferences import Response, annotate, judge_scores, make_pairs, oracle_quality
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.data.sources import make_source
from rl_reason.loop.preference import Pairs
from rl_reason.methods import air
from rl_reason.tasks import get
from rl_reason.tasks.base import Problem, Verdict
from rl_reason.tasks.relation import Relation

TOKENIZER = SentencePieceTokenizer.load()
ADD = get("add")
SUM = Problem("add", 2, {"a": 47, "b": 85})  # 7+5+0=12 4+8+1=13 ####132: steps of 17 characters


# What a response is worth


@pytest.mark.parametrize(
    "completion, quality",
    [
        ("7+5+0=12 4+8+1=13####132", 10),  # 1 + 5 + 4
        (" 7+5+0=12 4+8+1=13 #### 132", 10),  # spaces at the ends do not count
        ("7+5+0=12 4+8+1=13####131", 6),  # right steps, wrong answer
        ("7+5+0=12 4+8+1=13", 6),  # no answer
        ("####132", 5),  # the bare answer
        ("7+5+0=12 4+8+1=12####132", 9),  # 16 of 17 characters: floor(5 * 16 / 17) = 4
        ("7+5+0=12 4+8+1=13 0####132", 9),  # more than the steps is not the steps
        ("7+5+0=12 4+8+0=12####122", 4),  # 13 of 17: floor(3.82) = 3
        ("7+5+0=11####122", 3),  # 7 of 17: floor(2.06) = 2
        ("7+", 1),  # 2 of 17: floor(0.59) = 0
        ("", 1),
        ("####", 1),
        ("garbage", 1),
    ],
)
def test_quality_by_hand(completion, quality):
    assert ADD.solve(SUM).steps == "7+5+0=12 4+8+1=13"
    assert oracle_quality(completion, SUM, ADD) == quality


@pytest.mark.parametrize("name", ["add", "dfa", "sort", "make"])
def test_quality_rises_with_the_right_prefix_and_the_answer(name):
    task = get(name)
    for seed in range(5):
        problem = task.problem(np.random.default_rng(seed), task.levels[0])
        steps, answer = task.solve(problem)
        without = [oracle_quality(steps[:end] + "####?", problem, task) for end in range(len(steps) + 1)]
        with_answer = [oracle_quality(f"{steps[:end]}####{answer}", problem, task) for end in range(len(steps) + 1)]
        assert without == sorted(without) and (without[0], without[-1]) == (1, 6)
        assert with_answer == [quality + 4 for quality in without]
        assert oracle_quality(task.solve(problem).completion, problem, task) == 10


def test_a_failed_verifier_leaves_no_quality():
    class Broken(Relation):
        def verify(self, completion, problem):
            return Verdict(0.0, False, "down")

    broken = Broken(ADD.name, ADD.sizes, ADD.sample, ADD.ask, ADD.work)
    assert oracle_quality("####132", SUM, broken) is None


# The judge


def test_judges_are_integers_within_the_scale():
    quality = jnp.tile(jnp.arange(1.0, 11.0), (2000, 1))
    scores = judge_scores(quality, jax.random.key(0), noise_std=1.0, failure_rate=0.1)
    there = ~np.isnan(scores)
    assert set(np.asarray(scores)[there].tolist()) == set(range(1, 11))
    assert there.mean() == pytest.approx(0.9, abs=0.01)
    error = np.where(there, scores - quality, 0.0)[:, 3:7]  # away from the ends
    assert error.sum() / there[:, 3:7].sum() == pytest.approx(0.0, abs=0.05)
    # Rounding adds 1/12 to the variance.
    assert (error**2).sum() / there[:, 3:7].sum() == pytest.approx(1 + 1 / 12, abs=0.06)
    exact = judge_scores(quality, jax.random.key(0), noise_std=0.0, failure_rate=0.0)
    np.testing.assert_array_equal(exact, quality)
    assert np.isnan(judge_scores(jnp.array([jnp.nan]), jax.random.key(0), noise_std=1.0, failure_rate=0.0)).all()
    for wrong in (dict(noise_std=-1.0, failure_rate=0.0), dict(noise_std=1.0, failure_rate=2.0)):
        with pytest.raises(ValueError, match="judge:"):
            judge_scores(quality, jax.random.key(0), **wrong)


# Selection, over responses of four models of different strength


def respond(rng, example, skill: float) -> str:
    """The oracle's completion up to a slip, which ``skill`` makes later or absent."""
    steps, answer = ADD.solve(example.problem)
    if rng.random() < skill:
        return f"{steps}####{answer}" if rng.random() < 0.6 else f"####{answer}"
    cut = int(rng.integers(len(steps)))
    return f"{steps[:cut]}x####{answer if rng.random() < skill else '0'}"


@functools.cache
def population(num=120):
    source, rng = make_source(tasks=["add"], levels=[[2]], seed=0), np.random.default_rng(0)
    examples = [source.example(uid) for uid in range(num)]
    rows = []
    for example in examples:
        row = []
        for model, skill in (("policy", 0.5), ("policy", 0.5), ("a", 0.3), ("b", 0.6), ("c", 0.8), ("policy", 0.5)):
            text = respond(rng, example, skill)
            row.append(Response(text, (*TOKENIZER.encode(text), TOKENIZER.eos_id), model, model == "policy"))
        rows.append(row)
    prompts = [np.array([TOKENIZER.bos_id, *TOKENIZER.encode(x.prompt)], np.int32) for x in examples]
    return prompts, annotate(rows, examples, jax.random.key(1), noise_std=1.0, failure_rate=0.05)


ANY = dict(min_margin=1.0, max_margin=9.0, min_chosen_score=1.0, mix_policies=False)
STABLE = functools.partial(air.instruction_keep, max_variance=6.0, ddof=0)
ARMS = {  # (instruction filter, pair rules)
    "random": (None, ANY),
    "extreme": (None, ANY | dict(min_margin=6.0)),
    "instructions": (STABLE, ANY),
    "margin": (None, ANY | dict(min_margin=2.0, max_margin=3.0)),
    "score": (None, ANY | dict(min_chosen_score=8.0)),
    "mix": (None, ANY | dict(mix_policies=True)),
    "all": (STABLE, dict(min_margin=2.0, max_margin=3.0, min_chosen_score=8.0, mix_policies=True)),
}


@functools.cache
def arm(name, num_pairs=None):
    keep, rules = ARMS[name]
    prompts, rows = population()
    pick = functools.partial(air.pick, **rules)
    return make_pairs(prompts, rows, jax.random.key(2), keep_instructions=keep, pick_pairs=pick, num_pairs=num_pairs)


def of(name):
    """(chosen, rejected) responses of an arm."""
    made, (_, rows) = arm(name), population()
    return [(rows[b][c], rows[b][r]) for b, c, r in zip(made.prompt, made.chosen, made.rejected, strict=True)]


@pytest.mark.parametrize("name", ARMS)
def test_arms_obey_their_rules(name):
    made, (keep, rules), (prompts, rows) = arm(name), ARMS[name], population()
    assert len(made.pairs) == made.statistics["pairs/num"] == made.statistics["pairs/available"] > 0
    assert len(set(made.prompt.tolist())) == len(made.prompt)  # one pair an instruction
    for (chosen, rejected), pair, b in zip(of(name), made.pairs, made.prompt, strict=True):
        margin = chosen.score - rejected.score
        assert rules["min_margin"] <= margin <= rules["max_margin"] and chosen.score >= rules["min_chosen_score"]
        assert pair.chosen.tolist() == list(chosen.tokens) != pair.rejected.tolist() == list(rejected.tokens)
        assert pair.prompt is prompts[b]
        if keep is not None:
            assert bool(keep(jnp.asarray(preferences.scores_by_model(rows)))[b])
    histogram = {k: v for k, v in made.statistics.items() if k.startswith("pairs/margin/")}
    assert sum(histogram.values()) == len(made.pairs)
    assert made.statistics["pairs/keep_rate"] == 1.0 if keep is None else 0.1 < made.statistics["pairs/keep_rate"] < 1


def test_what_the_rules_are_for():
    # Responses are half the policy's own: nearly every prompt has a pair of one response of each kind.
    assert arm("mix").statistics["pairs/on_policy_fraction"] == pytest.approx(0.5, abs=0.05)
    # Wider margins flip less often than any margin; the judge's noise is 1.
    flipped = {name: arm(name).statistics["pairs/flipped_fraction"] for name in ARMS}
    assert flipped["extreme"] == 0.0 <= flipped["margin"] < flipped["random"] < 0.2
    assert arm("score").statistics["pairs/chosen_score_mean"] > arm("random").statistics["pairs/chosen_score_mean"]
    assert arm("all").statistics["pairs/missing_score_fraction"] == pytest.approx(0.05, abs=0.025)


def test_equal_numbers():
    few = int(min(arm(name).statistics["pairs/num"] for name in ARMS))
    for name in ("random", "margin"):
        made = arm(name, few)
        assert len(made.pairs) == made.statistics["pairs/num"] == few
        assert set(made.prompt.tolist()) <= set(arm(name).prompt.tolist())
        assert made.statistics["pairs/available"] == arm(name).statistics["pairs/num"]
    with pytest.raises(ValueError, match=r"num_pairs=1000, but of 120 prompts 120 are kept and \d+ have a pair"):
        arm("random", 1000)


def test_ragged_and_unscored_responses():
    row = lambda *scores: [Response(str(i), (i,), "m", True, s) for i, s in enumerate(scores)]
    rows = [row(9.0, 7.0), row(9.0), row(None, 9.0, 7.0), row(9.0, None), []]
    pick = functools.partial(air.pick, **ARMS["margin"][1])
    prompts = [np.array([1], np.int32)] * 5
    made = make_pairs(prompts, rows, jax.random.key(0), keep_instructions=None, pick_pairs=pick, num_pairs=None)
    assert list(zip(made.prompt.tolist(), made.chosen.tolist(), made.rejected.tolist(), strict=True)) == [
        (0, 0, 1),
        (2, 1, 2),
    ]
    assert made.statistics["pairs/missing_score_fraction"] == 0.25
    assert made.statistics["pairs/margin/2"] == 2 and made.statistics["pairs/flipped_fraction"] == 0.0
    with pytest.raises(ValueError, match="0 prompts, responses to 5"):
        make_pairs([], rows, jax.random.key(0), keep_instructions=None, pick_pairs=pick, num_pairs=None)
    np.testing.assert_array_equal(preferences.scores_by_model(rows)[:, 0], [9.0, 9.0, np.nan, 9.0, np.nan])


# Users' files

READING = PairReading(max_prompt_len_tokens=32, max_completion_len_tokens=16)
SAY = lambda role, content: {"role": role, "content": content}
ROWS = {
    "text": dict(prompt="1+1=", chosen="2", rejected="3"),
    "chat": dict(prompt=[SAY("user", "1+1=")], chosen=[SAY("assistant", "2")], rejected=[SAY("assistant", "3")]),
    "whole chats": dict(
        chosen=[SAY("user", "1+1="), SAY("assistant", "2")], rejected=[SAY("user", "1+1="), SAY("assistant", "3")]
    ),
    "both": dict(
        prompt="1+1=",
        chosen=[SAY("user", "1+1="), SAY("assistant", "2")],
        rejected=[SAY("user", "1+1="), SAY("assistant", "3")],
    ),
}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_formats(tmp_path, form, suffix):
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        write(path, [ROWS[form]])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[form]]), path)
    (pair,), report = load_pairs([str(path)], TOKENIZER, READING)
    assert pair.prompt.tolist() == [TOKENIZER.bos_id, *TOKENIZER.encode("1+1=")]
    assert pair.chosen.tolist() == [*TOKENIZER.encode("2"), TOKENIZER.eos_id]
    assert pair.rejected.tolist() == [*TOKENIZER.encode("3"), TOKENIZER.eos_id]
    assert (report.rows, report.kept) == (1, 1)


@pytest.mark.parametrize(
    "row, why",
    [
        (dict(prompt="a", chosen="b"), "no rejected; it has prompt, chosen"),
        (dict(chosen="b", rejected="c"), "no prompt, and chosen is text"),
        (dict(prompt=" ", chosen="b", rejected="c"), "prompt is empty"),
        (
            dict(prompt="a", chosen="b", rejected=[SAY("assistant", "c")]),
            "chosen is str, and chosen and rejected go together",
        ),
        (dict(prompt="a", chosen=["b"], rejected=["c"]), "chosen does not end with an assistant's text"),
        (
            dict(chosen=[SAY("user", "a"), SAY("assistant", "b")], rejected=[SAY("user", "z"), SAY("assistant", "c")]),
            "differ before their last message",
        ),
        (
            dict(prompt="z", **{k: ROWS["both"][k] for k in ("chosen", "rejected")}),
            "chosen begins with other messages than the prompt's",
        ),
        (
            dict(prompt="1" * 32, chosen="2", rejected="3"),
            "prompt has 33 tokens, BOS included, and max_prompt_len_tokens is 32",
        ),
        (dict(prompt="1", chosen="2", rejected="3" * 16), "rejected has 17 tokens, EOS included"),
    ],
)
def test_bad_rows_are_refused_by_place_or_counted(tmp_path, caplog, row, why):
    path = write(tmp_path / "pairs.jsonl", [ROWS["text"], row])
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: .*"):
        load_pairs(path, TOKENIZER, READING)
    with pytest.raises(ValueError) as error:
        load_pairs(path, TOKENIZER, READING)
    assert why in str(error.value)
    lenient = PairReading(32, 16, on_bad_row="skip", on_long_pair="drop")
    pairs, report = load_pairs(path, TOKENIZER, lenient)
    assert len(pairs) == 1 and report.bad + report.too_long == 1
    assert "1 of 2 pairs kept" in caplog.text


def test_identical_completions_and_empty_files(tmp_path, caplog):
    same = dict(prompt="a", chosen="b", rejected="b")
    path = write(tmp_path / "pairs.jsonl", [same, ROWS["text"]])
    assert load_pairs(path, TOKENIZER, READING).report.identical == 1
    assert "1 with chosen and rejected the same" in caplog.text
    with pytest.raises(ValueError, match=r"no pairs in .*0 of 1 pairs kept"):
        load_pairs(write(tmp_path / "none.jsonl", [same]), TOKENIZER, READING)
    with pytest.raises(ValueError, match="on_bad_row='drop': use one of refuse, skip"):
        PairReading(32, 16, on_bad_row="drop")


# Batches


def some_data(num=10, reference=True) -> PairData:
    ids = lambda *x: np.array(x, np.int32)
    pairs = [Preference(ids(*range(3, 4 + i % 3)), ids(10 + i, 2), ids(*[20 + i] * (i % 4))) for i in range(num)]
    known = (np.arange(num, dtype=np.float32), -np.arange(num, dtype=np.float32)) if reference else None
    return PairData(pairs, prompt_len=3, completion_len=4, pad_id=0, reference=known)


def test_rows_are_prompt_completion_padding():
    batch = some_data().rows([5, 0])
    # Pair 5: prompt 3 4 5, chosen 15 2, rejected 25. Pair 0: prompt 3, chosen 10 2, rejected nothing.
    assert batch.chosen_tokens.tolist() == [[3, 4, 5, 15, 2, 0, 0], [3, 10, 2, 0, 0, 0, 0]]
    assert batch.rejected_tokens.tolist() == [[3, 4, 5, 25, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0]]
    assert batch.prompt_len.tolist() == [3, 1]
    assert [np.flatnonzero(row).tolist() for row in batch.chosen_mask] == [[3, 4], [1, 2]]
    assert [np.flatnonzero(row).tolist() for row in batch.rejected_mask] == [[3], []]
    assert batch.ref_chosen_logprobs.tolist() == [5, 0] and batch.ref_rejected_logprobs.tolist() == [-5, 0]
    pairs = Pairs(*(None if x is None else jnp.asarray(x) for x in batch))
    assert all(getattr(pairs, name) is not None for name in batch._fields)
    bare = some_data(reference=False).rows([0])
    assert bare.ref_chosen_logprobs is None and bare.ref_rejected_logprobs is None


def test_streams_are_pure_functions_of_the_step():
    data = some_data()
    make = lambda **changes: pairs_stream(data, **dict(batch_size=4, seed=7) | changes)
    stream, again = make(), make(num_threads=2, prefetch=3)
    drawn = [next(stream) for _ in range(5)]
    assert all(np.array_equal(a, b) for x in drawn for a, b in zip(x, next(again), strict=True))
    # Ten pairs an epoch: draws 0..9 and 10..19 are each a shuffle of all, and the two differ.
    seen = np.concatenate([batch.ref_chosen_logprobs for batch in drawn])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10].tolist() != seen[10:].tolist()
    assert next(make(seed=8)).ref_chosen_logprobs.tolist() != drawn[0].ref_chosen_logprobs.tolist()
    part = make(rows=range(2, 4))
    np.testing.assert_array_equal(next(part).chosen_tokens, drawn[0].chosen_tokens[2:])
    state = json.loads(json.dumps(part.get_state()))
    expected = next(part)
    resumed = make(rows=range(2, 4))
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed).rejected_tokens, expected.rejected_tokens)


def test_one_pass_in_order():
    batches = list(some_data().in_order(4))
    seen = np.concatenate([batch.ref_chosen_logprobs for batch in batches])
    assert seen.tolist() == [*range(10), 9, 9]  # the last is filled up
    halves = [
        np.concatenate([b.ref_chosen_logprobs for b in some_data().in_order(4, r)]) for r in (range(2), range(2, 4))
    ]
    assert np.concatenate(halves).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 9, 9]


def test_data_that_does_not_fit_is_refused():
    pair = Preference(*(np.array(x, np.int32) for x in ([1, 2], [3], [4, 5])))
    for pairs, widths, why in (
        ([], dict(prompt_len=2, completion_len=2), "no pairs"),
        ([pair], dict(prompt_len=1, completion_len=2), "pair 0 has a prompt of 2"),
        ([pair], dict(prompt_len=2, completion_len=1), "a completion of 2 tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            PairData(pairs, pad_id=0, **widths)
    with pytest.raises(ValueError, match="not 1, one a pair"):
        PairData([pair], prompt_len=2, completion_len=2, pad_id=0, reference=(np.zeros(2, np.float32),) * 2)
