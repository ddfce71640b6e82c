"""Pairs of a preference run: the cache of judged responses, what is refused by name, statistics, files, held-out pairs."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import call
from rl_reason import build, pair_data
from rl_reason.drivers.preference import Preference
from rl_reason.loop import pair_parts
from rl_reason.loop.pair_parts import POLICY
from rl_reason.report.console import Display
from tests.support import load_config, one_device

JUDGED_PROMPTS = 8


def config_of(**preference):
    """air.py:smoke, smaller, with keys of config.preference set."""
    config = load_config("air")
    config.model.update(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16)
    config.warmup.num_steps = 0
    config.rollout.completion_len = 8
    models = (
        dict(name="sibling", seed_offset=1, model={}, warmup={}),
        dict(name="small", seed_offset=2, model=dict(mlp_size=8), warmup={}),
    )
    sizes = dict(num_prompts=JUDGED_PROMPTS, num_heldout_prompts=4, prompts_per_call=4, num_pairs=4)
    config.preference.update(models=models, **sizes)
    config.preference.judge.noise_std = 3.0  # untrained models are all worth 1
    for key, value in preference.items():
        config.preference[key] = value
    return config


def built(**preference) -> build.Experiment:
    return build.build(config_of(**preference), one_device())


@pytest.fixture
def quality(monkeypatch):
    """An oracle that ranks what untrained models write: by how many different characters it has."""
    from rl_reason.data import preferences

    monkeypatch.setattr(preferences, "oracle_quality", lambda text, problem, task: 1 + min(len(set(text)), 9))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the folder of judged responses in it."""
    monkeypatch.setenv("RL_REASON_CACHE", str(tmp_path))
    return tmp_path / "responses"


class Made:
    """Makes pairs and says who was warmed up for it."""

    def __init__(self, experiment: build.Experiment):
        self.warmed: list[str] = []

        def warm(author, name):
            self.warmed.append(name)
            return build.init_params(author)

        self.checked: list[str] = []
        with jax.set_mesh(experiment.mesh):
            self.pairs = pair_data.make(experiment, Display(enabled=False), warm, self.checked.append)


def ids_of(made: pair_data.RunPairs):
    return [[x.tolist() for x in pair] for pair in made.train.pairs]


@pytest.mark.usefixtures("quality")
def test_a_hit_a_miss_and_a_damaged_entry(cache):
    first = Made(built())
    assert first.warmed == [POLICY, "sibling", "small"]  # once, for both splits
    assert first.checked and all(where.startswith("while models answered") for where in first.checked)
    train, heldout = sorted(cache.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    again = Made(built())
    assert again.warmed == [] and again.pairs.fingerprint == first.pairs.fingerprint
    assert again.pairs.records == first.pairs.records

    # Another rule about the same responses reads them; other responses are made.
    rule = call("air.pick", min_margin=2.0, max_margin=9.0, min_chosen_score=1.0, mix_policies=False)
    assert Made(built(pairs=rule, num_pairs=1)).warmed == []
    assert Made(built(num_other_samples=1)).warmed == [POLICY, "sibling", "small"]

    # One split damaged: that one is made again, the same.
    whole = train.read_bytes()
    train.write_bytes(whole[:200] + b"x" * 50 + whole[250:])
    before = heldout.stat().st_mtime_ns
    mended = Made(built())
    assert mended.warmed == [POLICY, "sibling", "small"]
    assert mended.pairs.fingerprint == first.pairs.fingerprint and heldout.stat().st_mtime_ns == before
    with np.load(io.BytesIO(train.read_bytes())) as now, np.load(io.BytesIO(whole)) as then:
        for name in then:
            np.testing.assert_array_equal(now[name], then[name])
    assert not [path for path in cache.iterdir() if path.suffix != ".npz"]


@pytest.mark.usefixtures("quality", "cache")
def test_statistics_and_records_say_what_is_trained_on(tmp_path):
    experiment = built()
    made = Made(experiment).pairs
    assert len(made.train.pairs) == len(made.records) == made.statistics["pairs/num"] == 4
    assert made.statistics["pairs/prompts"] == JUDGED_PROMPTS
    assert {f"pairs/quality/{name}" for name in (POLICY, "sibling", "small")} <= set(made.statistics)
    assert 0 <= made.statistics["pairs/flipped_fraction"] <= 1 and made.statistics["pairs/seconds"] > 0
    margins = [record["chosen_score"] - record["rejected_score"] for record in made.records]
    assert made.statistics["pairs/margin_mean"] == pytest.approx(np.mean(margins)) and min(margins) >= 1
    flipped = np.mean([record["chosen_quality"] < record["rejected_quality"] for record in made.records])
    assert made.statistics["pairs/flipped_fraction"] == pytest.approx(flipped)
    decode = experiment.tokenizer.decode
    for pair, record in zip(made.train.pairs, made.records, strict=True):
        assert [decode(x) for x in pair] == [record["prompt"], record["chosen"], record["rejected"]]

    pair_data.write(tmp_path, made)
    assert json.loads((tmp_path / "pairs.json").read_text())["pairs/num"] == 4
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == made.records
    pair_data.write(tmp_path, made)  # a run that goes on
    other = pair_data.RunPairs(made.train, None, made.statistics, made.records, "another")
    with pytest.raises(pair_data.PairError, match="has another fingerprint than another"):
        pair_data.write(tmp_path, other)


@pytest.mark.usefixtures("quality", "cache")
def test_held_out_pairs_are_in_the_oracles_order_whatever_the_rules():
    random = call("air.pick", min_margin=1.0, max_margin=9.0, min_chosen_score=1.0, mix_policies=False)
    a, b = Made(built()).pairs, Made(built(pairs=random, instructions=None)).pairs
    assert a.heldout is not None and b.heldout is not None and 0 < len(a.heldout.pairs) <= 4
    assert [[x.tolist() for x in pair] for pair in a.heldout.pairs] == [
        [x.tolist() for x in pair] for pair in b.heldout.pairs
    ]
    decode = built().tokenizer.decode
    worth = lambda ids: len(set(decode(ids)))
    assert all(min(worth(pair.chosen), 9) > min(worth(pair.rejected), 9) for pair in a.heldout.pairs)
    prompts = {decode(pair.prompt) for pair in a.heldout.pairs}
    assert prompts.isdisjoint(record["prompt"] for record in a.records)
    assert Made(built(num_heldout_prompts=0)).pairs.heldout is None


@pytest.mark.usefixtures("cache")
def test_rules_that_leave_too_little_say_so():
    rule = call("air.pick", min_margin=1.0, max_margin=9.0, min_chosen_score=10.0, mix_policies=False)
    experiment = built(pairs=rule, judge=dict(noise_std=0.0, failure_rate=0.0))  # everything is worth 1
    with pytest.raises(pair_data.PairError, match=r"num_pairs=4, but of 8 prompts 8 are kept and 0 .*num_samples and"):
        Made(experiment)


def write_pairs(path, count=6):
    rows = [{"prompt": f"add {i}+{i}=", "chosen": f"####{2 * i}", "rejected": "####"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.usefixtures("cache")
def test_files_are_taken_as_they_are(tmp_path):
    files = (write_pairs(tmp_path / "mine.jsonl"),)
    made = Made(built(files=files, heldout_files=files, num_pairs=0))
    assert made.warmed == [] and len(made.pairs.train.pairs) == 6
    assert made.pairs.heldout is not None and len(made.pairs.heldout.pairs) == 6
    assert made.pairs.records[1] == {"prompt": "add 1+1=", "chosen": "####2", "rejected": "####"}
    assert made.pairs.statistics["pairs/files/kept"] == 6
    some = ids_of(Made(built(files=files, num_pairs=4)).pairs)
    assert len(some) == 4 and all(pair in ids_of(made.pairs) for pair in some)


def test_files_are_refused_before_anything_compiles(tmp_path):
    files = (write_pairs(tmp_path / "mine.jsonl"),)
    with pytest.raises(ValueError, match=r"num_pairs=7, but .*mine\.jsonl: 6 of 6 pairs kept.* Set it to 0 for all"):
        built(files=files, num_pairs=7)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "add 1+1=", "chosen": "#" * 40, "rejected": "2"}) + "\n")
    with pytest.raises(ValueError, match=r"long\.jsonl:1: chosen has"):
        built(files=(str(long),), num_pairs=0)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(objective=None), "config.preference.objective is None; set it to a loss of pairs, such as call('dpo."),
        (dict(pairs=None), "config.preference.pairs is None; set it to a rule such as call('air.pick'"),
        (dict(heldout_files=("x",)), "config.preference.heldout_files goes with config.preference.files"),
        (dict(models=()), "config.preference.instructions compares the scores of different models"),
        (dict(models=(dict(name="a"),)), "config.preference.models[0] has keys ['name']; it takes exactly"),
        (
            dict(models=(dict(name=POLICY, seed_offset=1, model={}, warmup={}),)),
            "config.preference.models[0].name='policy': names are distinct",
        ),
        (
            dict(models=(dict(name="a", seed_offset=1, model=dict(num_layer=1), warmup={}),)),
            "models[0].model has 'num_layer', which config.model does not. Did you mean 'num_layers'?",
        ),
        (
            dict(models=(dict(name="a", seed_offset=1, model={}, warmup=dict(num_steps=2.5)),)),
            "models[0].warmup.num_steps=2.5; config.warmup has 0.",
        ),
        (dict(num_prompts=0), "config.preference.num_prompts=0 must be at least 1."),
        (
            dict(microbatches=3),
            "pairs_per_step=4 / microbatches=3 over 1 row shards (mesh data x fsdp x expert) = 1.33333 pairs",
        ),
        (dict(heldout_every=3), "config.preference.heldout_every=3 is no multiple of config.steps_per_call=2"),
        (dict(judge=dict(noise_std=-1.0, failure_rate=0.0)), "noise_std must be at least 0"),
        (
            dict(objective=call("dpo.objective", loss_type="sigmoid", beta=0.0, label_smoothing=0.0)),
            "dpo: beta=0.0 must be above 0",
        ),
        (
            dict(objective=call("dpo.objective", loss_type="sigmoid", beta=0.1)),
            "config.preference.objective = call('dpo.objective', ...): missing ['label_smoothing']",
        ),
        (
            dict(pairs=call("air.pick", min_margin=0.0, max_margin=3.0, min_chosen_score=8.0, mix_policies=True)),
            "air: min_margin=0.0, max_margin=3.0",
        ),
        (
            dict(pairs=call("air.instruction_keep", max_variance=1.5, dof=0)),
            "config.preference.pairs = call('air.instruction_keep', ...): missing ['ddof'], unknown ['dof'].",
        ),
        (dict(instructions=call("air.pik", max_variance=1.5)), "config.preference.instructions.fn='air.pik'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        built(**changes)


def test_without_tasks_or_files_there_are_no_pairs():
    config = config_of()
    config.data.update(tasks=(), levels=None)
    with pytest.raises(
        ValueError, match=r"nothing to make pairs of: set config\.preference\.files .* or config\.data\.tasks"
    ):
        build.build(config, one_device())


def test_other_models_differ_from_the_policy_in_what_they_say():
    experiment = built()
    assert set(experiment.others) == {"sibling", "small"}
    assert experiment.others["small"].parts.model.mlp_size == 8 and experiment.parts.model.mlp_size == 16
    assert [x.config.seed for x in experiment.others.values()] == [1, 2]
    assert pair_parts.other_configs(config_of(files=("x.jsonl",))) == {}


@pytest.mark.usefixtures("quality", "cache")
@pytest.mark.parametrize("precompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_driver_measures_held_out_pairs_and_takes_its_reference_back(precompute):
    experiment = built(precompute_reference=precompute)
    made = Made(experiment).pairs
    with jax.set_mesh(experiment.mesh):
        params = build.init_params(experiment)
        driver = Preference(experiment, made.train, made.heldout)
        state = driver.initial_state(params)
        assert (state.ref_params is None) == precompute
        assert set(driver.pending) == ({"heldout", "train"} if precompute else {"heldout"})
        # On resume the state is made around other parameters, and what was saved comes back.
        resumed = Preference(experiment, made.train, made.heldout)
        other = resumed.initial_state(jax.tree.map(lambda x: x + 0.1, params))
        del other
        resumed.pending = driver.pending
        out, again = (d.advance(jax.tree.map(jnp.copy, state)) for d in (driver, resumed))
    assert out.metrics.keys() == again.metrics.keys()
    for name, values in out.metrics.items():
        np.testing.assert_array_equal(values, again.metrics[name], err_msg=name)
    assert out.metrics["actor/preference_loss"][0] == pytest.approx(np.log(2), abs=1e-5)
    assert out.metrics["training/global_step"].tolist() == [1, 2]
    assert out.metrics["training/epoch"].tolist() == [1, 2]  # 4 pairs, 4 a step
    accuracy = out.metrics["heldout_pairs/accuracy"]
    assert np.isnan(accuracy[0]) and 0 <= accuracy[1] <= 1
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in made.train.pairs)
    assert out.metrics["perf/total_num_tokens"].tolist() == [tokens, tokens]
